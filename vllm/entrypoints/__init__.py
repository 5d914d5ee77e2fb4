"""What people start: the HTTP server, the ``vllm`` command and the offline ``LLM``.

Empty on purpose, so that importing one of them loads nothing of the others.
"""
