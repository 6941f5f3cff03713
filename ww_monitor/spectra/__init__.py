"""Spectra of weight matrices as pure numbers: batched functions on torch tensors, no model, no step, no I/O."""
