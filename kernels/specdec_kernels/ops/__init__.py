"""Operations on plain tensors: the definition in `name.py`, and beside it `name_triton.py` where one is faster."""
