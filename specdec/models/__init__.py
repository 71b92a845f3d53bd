"""Language models behind one bundle, `specdec.types.Model`: toys, checkpoints, and anything transformers can run."""
