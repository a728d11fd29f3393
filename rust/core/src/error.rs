//! One error type for the crate: a variant per cause, the human text in `Display`.
use std::fmt;

/// What went wrong. Every variant but [`Error::OutOfMemory`] is a fault of the caller's input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A format name that does not parse; the text says which part and what is allowed.
    Format(String),
    /// Shapes that do not fit each other; the text carries both.
    Shape(String),
    /// A value out of its range: a code, a scale, a zero point, a parameter.
    Value(String),
    /// A combination that does not exist, such as a compute class a format does not have.
    Unsupported(String),
    /// An allocation of this many bytes failed.
    OutOfMemory(usize),
    /// The caller's poll function asked to stop.
    Interrupted,
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format(s) | Self::Shape(s) | Self::Value(s) | Self::Unsupported(s) => f.write_str(s),
            Self::OutOfMemory(n) => write!(f, "cannot allocate {n} bytes"),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}
