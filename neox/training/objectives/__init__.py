"""What a run minimises: the next token's loss, or an objective of preferences or rewards; one file for each.

An engine calls its objective with the model and a micro-batch, and knows nothing else of it.
"""
