"""Vocabularies: trained from text, extended by a domain's words, and judged by a text.

No task and no training of models is known here; a text comes as an iterable of strings, wherever it is from.
"""
