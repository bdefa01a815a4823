"""From rows to tensors: `formats` and `spans` (rows -> ids), `tokenization` (text -> ids), `collators` (-> tensors).

A *group* is one prompt with K candidates and a rating for each. A preference pair is a group of two. A *span* is a
stretch of a completion with a value: an outcome, a step or a segment. Nothing here knows models, losses or trainers.
"""
