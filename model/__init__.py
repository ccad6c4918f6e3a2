"""Prefill models in JAX / Flax NNX. Knows nothing of Ray, HTTP or pydantic.

Dimension letters, used in einsum strings, annotations and sharding names alike:

    B  bins of packed segments             K  key/value heads
    T  positions in a bin                  G  query heads per key/value head, N / K
    S  key positions                       H  head width
    M  tokens in one program call, B * T   F  feed-forward width
    D  model width                         V  vocabulary (rows of the output head)
    N  query heads                         L  layers
    R  read positions                      P  key positions of a shared prefix
"""
