//! Bounded readers and atomic writers of tensor files.
//!
//! A checkpoint is somebody else's bytes. The reader therefore believes nothing: every count, length and product is
//! checked before memory is taken for it, and every way a file can be wrong has its own [`Error`] variant. The writer
//! keeps the opposite promise: the target path holds the old file or the complete new one, at every moment.
//!
//! ```
//! use nibblas_io::{Dtype, Reader, Spec, Writer};
//! # fn main() -> nibblas_io::Result<()> {
//! # let dir = std::env::temp_dir().join(format!("nibblas-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir).unwrap();
//! let path = dir.join("two.safetensors");
//! let spec = Spec { name: "w".into(), dtype: Dtype::U8, shape: vec![2, 3] };
//! let mut writer = Writer::create(&path, vec![spec], vec![])?;
//! writer.append("w", &[1, 2, 3, 4, 5, 6])?;
//! writer.finish()?;
//!
//! let reader = Reader::open(&path)?;
//! let mut row = [0; 3];
//! reader.read_into("w", 3, &mut row)?;
//! assert_eq!(row, [4, 5, 6]);
//! # std::fs::remove_dir_all(&dir).unwrap();
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod error;
pub mod safetensors;

pub use error::{Error, Result};
pub use safetensors::{Dtype, Header, Reader, Spec, Tensor, Writer};
