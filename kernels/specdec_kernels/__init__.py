"""Operations under specdec's models and policies: for each a torch definition, and beside it what is faster.

`dispatch.choose` says which implementation of an operation runs on a device, and why.
"""
