"""kvtool train-lm and train-seq2seq."""
