"""Pictures, hints and captions: from a folder on disk to one `Example` at a time.

Read in this order: `example` (what a pair is), `settings`, `sources` (which pairs a folder holds), `picture`
(decoding), `transforms` (one geometry for picture and hint), `annotate` (hints made from pictures), `load` (all of it,
for one pair).
"""
