"""Generators of the sample corpora's text: English, mathematics, Chinese and source code."""
