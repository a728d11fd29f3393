//! Reading: the header at once, tensors on demand.
use super::{Header, MAX_HEADER};
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// An open file with a checked header. Reads are positional: threads and forked children may share a reader.
///
/// The file is read, never mapped, so a file that shrinks underneath gives an error and not a signal.
#[derive(Debug)]
pub struct Reader {
    file: File,
    header: Header,
    data: u64,
}

impl Reader {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`], or one variant for each way the file can be wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Opening a pipe would wait for a writer; look first.
        if !std::fs::metadata(path)?.is_file() {
            return Err(Error::NotAFile(path.into()));
        }
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        if len < 8 {
            return Err(Error::TooShort { file: len });
        }
        let mut field = [0; 8];
        read_exact_at(&file, &mut field, 0).map_err(|e| shrunk(e, len, 0))?;
        let header = u64::from_le_bytes(field);
        if header > MAX_HEADER {
            return Err(Error::HeaderTooLarge { header });
        }
        if header > len - 8 {
            return Err(Error::HeaderPastEnd { header, file: len });
        }
        let data = 8 + header;
        (&file).seek(SeekFrom::Start(8))?;
        let header = Header::parse(BufReader::new((&file).take(header)), len - data)?;
        Ok(Self { file, header, data })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Fills `out` with the bytes of a tensor from byte `offset` of it.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`], [`Error::Io`], and [`Error::Truncated`] if the file has become
    /// shorter since it was opened.
    pub fn read_into(&self, name: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let t = &self.header.tensors()[self.header.position(name)?];
        let len = out.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > t.nbytes()) {
            return Err(Error::OutOfRange { name: name.into(), offset, len, size: t.nbytes() });
        }
        let at = self.data + t.begin + offset;
        read_exact_at(&self.file, out, at).map_err(|e| {
            let have = self.file.metadata().map_or(0, |m| m.len().saturating_sub(self.data));
            shrunk(e, self.header.data_len(), have)
        })
    }

    /// All bytes of a tensor.
    ///
    /// # Errors
    /// As [`Reader::read_into`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let size = self.header.tensors()[self.header.position(name)?].nbytes();
        let size = usize::try_from(size).map_err(|_| Error::SizeOverflow { name: name.into() })?;
        let mut out = vec![0; size];
        self.read_into(name, 0, &mut out)?;
        Ok(out)
    }
}

/// An end of file inside the range that was checked means the file changed under the reader.
fn shrunk(e: std::io::Error, need: u64, have: u64) -> Error {
    if e.kind() == std::io::ErrorKind::UnexpectedEof {
        Error::Truncated { need, have }
    } else {
        Error::Io(e)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, at) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                out = &mut out[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
