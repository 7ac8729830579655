"""Imported by the fork server before any rank exists: one thread, and no warm-up left for the ranks."""

import torch

torch.set_num_threads(1)
