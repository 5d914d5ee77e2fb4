"""Builds the package. All metadata is in pyproject.toml.

csrc/ holds no sources yet, so there is nothing native to build and this installs pure Python.
"""

from setuptools import setup

setup()
