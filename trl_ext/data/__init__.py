"""From rows to tensors: `formats` and `spans` (rows -> ids), `tokenization` (text -> ids), `collators` (-> tensors).

A *group* is one prompt with K candidates and a rating for each; a preference pair is a group of two. A *span* is some
characters of a completion with a value: an outcome, a step, a segment. Nothing here knows models, losses or trainers.
"""
