//! Bit packing of codes along K.
