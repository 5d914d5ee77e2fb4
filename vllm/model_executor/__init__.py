"""Networks and how their weights are loaded; knows nothing of requests or scheduling.

``weights`` reads checkpoint files, ``layers`` and ``models`` are the networks, ``codecs`` turn
frames into samples, ``heads`` and ``framing`` sit between.
"""
