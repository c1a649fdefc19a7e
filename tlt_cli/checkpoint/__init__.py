"""Files to named tensors and back: a lazy reader, a streaming atomic writer, card and lineage."""
