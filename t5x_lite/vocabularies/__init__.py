"""Kinds of vocabulary files; `t5x_lite.vocab.load` picks one."""
