//! One error type for the crate: a variant per cause, the human text in `Display`.
use std::fmt;
use std::path::PathBuf;

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with a file.
#[derive(Debug)]
pub enum Error {
    /// The operating system refused.
    Io(std::io::Error),
    /// The path is a folder, a device or a pipe.
    NotAFile(PathBuf),
    /// Fewer bytes than the length field needs.
    TooShort {
        /// Bytes in the file.
        file: u64,
    },
    /// The length field exceeds the limit.
    HeaderTooLarge {
        /// What the length field says.
        header: u64,
    },
    /// The length field points past the end of the file.
    HeaderPastEnd {
        /// What the length field says.
        header: u64,
        /// Bytes in the file.
        file: u64,
    },
    /// The header is not the JSON object it must be; the text says where.
    Json(String),
    /// Two tensors have one name.
    DuplicateName(String),
    /// A key occurs twice inside one entry.
    DuplicateField {
        /// The entry.
        name: String,
        /// The key.
        field: String,
    },
    /// An entry lacks a key.
    MissingField {
        /// The entry.
        name: String,
        /// The key.
        field: &'static str,
    },
    /// More tensors than the limit.
    TooManyTensors,
    /// More metadata entries than the limit.
    TooManyMetadata,
    /// A name, a metadata key or a metadata value longer than its limit.
    TextTooLong {
        /// Its bytes.
        len: usize,
    },
    /// A name the format keeps for itself.
    ReservedName(String),
    /// An element type this crate does not know.
    UnknownDtype {
        /// The tensor.
        name: String,
        /// What the file says.
        dtype: String,
    },
    /// More dimensions than the limit.
    TooManyDims {
        /// The tensor.
        name: String,
    },
    /// The number of elements, or their bytes, does not fit 64 bits.
    SizeOverflow {
        /// The tensor.
        name: String,
    },
    /// Elements smaller than a byte do not fill the last byte.
    PartialByte {
        /// The tensor.
        name: String,
    },
    /// The end offset lies before the begin offset.
    OffsetsReversed {
        /// The tensor.
        name: String,
    },
    /// Offsets and shape disagree.
    SizeMismatch {
        /// The tensor.
        name: String,
        /// Bytes that type and shape need.
        shape: u64,
        /// Bytes between the offsets.
        offsets: u64,
    },
    /// A tensor begins inside another one.
    Overlap {
        /// The tensor.
        name: String,
    },
    /// Bytes before this tensor belong to nobody.
    Hole {
        /// The tensor.
        name: String,
    },
    /// The tensors need more bytes than the file has.
    Truncated {
        /// Bytes of data that the header describes.
        need: u64,
        /// Bytes of data in the file.
        have: u64,
    },
    /// The file goes on after the last tensor.
    TrailingBytes {
        /// How many bytes too many.
        extra: u64,
    },
    /// No tensor has this name.
    NoSuchTensor(String),
    /// A read or write outside a tensor.
    OutOfRange {
        /// The tensor.
        name: String,
        /// First byte asked for.
        offset: u64,
        /// Number of bytes asked for.
        len: u64,
        /// Bytes of the tensor.
        size: u64,
    },
    /// The file is to be finished but a tensor still lacks bytes.
    Incomplete {
        /// The tensor.
        name: String,
        /// Bytes still to come.
        missing: u64,
    },
}

/// Shortens a name from a file, so that a hostile one cannot flood a message, and makes it printable.
fn clip(name: &str) -> String {
    const LIMIT: usize = 80;
    let mut text: String = name.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if name.chars().nth(LIMIT).is_some() {
        text.push_str("...");
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(e) => e.fmt(f),
            Self::NotAFile(p) => write!(f, "{} is not a regular file", p.display()),
            Self::TooShort { file } => write!(f, "a file of {file} bytes is too short to be a safetensors file"),
            Self::HeaderTooLarge { header } => {
                write!(
                    f,
                    "the header length field says {header} bytes, the limit is {}",
                    crate::safetensors::MAX_HEADER
                )
            }
            Self::HeaderPastEnd { header, file } => {
                write!(f, "the header length field says {header} bytes in a file of {file} bytes")
            }
            Self::Json(e) => write!(f, "the header is not valid: {e}"),
            Self::DuplicateName(n) => write!(f, "two entries are named '{}'", clip(n)),
            Self::DuplicateField { name, field } => {
                write!(f, "entry '{}' has the key '{}' twice", clip(name), clip(field))
            }
            Self::MissingField { name, field } => write!(f, "entry '{}' lacks the key '{field}'", clip(name)),
            Self::TooManyTensors => write!(f, "more than {} tensors", crate::safetensors::MAX_TENSORS),
            Self::TooManyMetadata => write!(f, "more than {} metadata entries", crate::safetensors::MAX_METADATA),
            Self::TextTooLong { len } => {
                write!(f, "a name or a metadata text of {len} bytes is longer than the limit")
            }
            Self::ReservedName(n) => write!(f, "a tensor cannot be named '{}'", clip(n)),
            Self::UnknownDtype { name, dtype } => {
                write!(f, "tensor '{}' has the unknown type '{}'", clip(name), clip(dtype))
            }
            Self::TooManyDims { name } => {
                write!(f, "tensor '{}' has more than {} dimensions", clip(name), crate::safetensors::MAX_DIMS)
            }
            Self::SizeOverflow { name } => write!(f, "the size of tensor '{}' does not fit 64 bits", clip(name)),
            Self::PartialByte { name } => write!(f, "tensor '{}' does not end at a byte", clip(name)),
            Self::OffsetsReversed { name } => write!(f, "tensor '{}' ends before it begins", clip(name)),
            Self::SizeMismatch { name, shape, offsets } => {
                write!(f, "tensor '{}' needs {shape} bytes by its shape but has {offsets} by its offsets", clip(name))
            }
            Self::Overlap { name } => write!(f, "tensor '{}' overlaps another one", clip(name)),
            Self::Hole { name } => write!(f, "unused bytes before tensor '{}'", clip(name)),
            Self::Truncated { need, have } => {
                write!(f, "the file is truncated: the tensors need {need} bytes, {have} are there")
            }
            Self::TrailingBytes { extra } => write!(f, "{extra} unused bytes after the last tensor"),
            Self::NoSuchTensor(n) => write!(f, "no tensor is named '{}'", clip(n)),
            Self::OutOfRange { name, offset, len, size } => {
                write!(f, "{len} bytes from offset {offset} leave tensor '{}' of {size} bytes", clip(name))
            }
            Self::Incomplete { name, missing } => {
                write!(f, "tensor '{}' still lacks {missing} bytes", clip(name))
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(e) => Some(e),
            _ => None,
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::Io(e)
    }
}
