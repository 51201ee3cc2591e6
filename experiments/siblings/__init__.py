"""Sibling groups of ImageNet-1K's classes from WordNet, for the benchmark's feature absorption (M7).

Two classes are siblings if WordNet gives them a hypernym in common. ``make`` reads WordNet's own database file
(version 3.0, from which ImageNet's ids come; Debian's package wordnet-base) and timm's list of the 1,000 ids, and
writes ``sae_lightning/assets/siblings/imagenet.json``.
"""
