"""The GPT-NeoX decoder, written as an ordered list of layers that knows nothing of ranks.

Shape legend, used as suffixes throughout the package:

    B  sequences in the micro-batch      D  hidden size            F  feed-forward width
    S  tokens in a sequence              N  attention heads        V  vocabulary of the softmax
    K  keys visible to the queries       H  size of one head       T  tensor-parallel size

Inside a tensor-parallel rank, N, F and V are the local shares; under sequence parallelism the
residual stream between layers is [B, S/T, D].
"""
