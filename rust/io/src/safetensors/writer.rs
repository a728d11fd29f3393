//! Writing: all or nothing.
use super::{Header, Spec};
use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file whose tensors are known by name, type and shape before their bytes are.
///
/// Everything goes to a temporary file in the target's folder. [`Writer::finish`] flushes it to the disk and renames
/// it over the target; dropping the writer before that removes it. A target that existed is replaced whole (a symbolic
/// link is followed) and keeps its permissions.
#[derive(Debug)]
pub struct Writer {
    header: Header,
    /// Bytes written so far of each tensor.
    filled: Vec<u64>,
    data: u64,
    temp: Temp,
}

impl Writer {
    /// Makes the temporary file and writes the header.
    ///
    /// # Errors
    /// As [`Header::layout`], [`Error::NotAFile`] if the target is a folder, a device or a pipe, and [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, specs: Vec<Spec>, metadata: Vec<(String, String)>) -> Result<Self> {
        let header = Header::layout(specs, metadata)?;
        let bytes = header.to_bytes()?;
        let data = bytes.len() as u64;
        let mut temp = Temp::create(path.as_ref())?;
        temp.file.write_all(&bytes)?;
        temp.file.set_len(data + header.data_len())?;
        Ok(Self { filled: vec![0; header.tensors().len()], header, data, temp })
    }

    /// The header: the place of each tensor.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Adds bytes to a tensor, after those it has. Tensors may be filled in any order, and in turns.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`] if the tensor would grow past its size, [`Error::Io`].
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let i = self.header.position(name)?;
        let t = &self.header.tensors()[i];
        let (offset, len) = (self.filled[i], bytes.len() as u64);
        if len > t.nbytes() - offset {
            return Err(Error::OutOfRange { name: name.into(), offset, len, size: t.nbytes() });
        }
        self.temp.file.seek(SeekFrom::Start(self.data + t.begin + offset))?;
        self.temp.file.write_all(bytes)?;
        self.filled[i] += len;
        Ok(())
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// [`Error::Incomplete`], [`Error::Io`]; the target is then untouched.
    pub fn finish(self) -> Result<()> {
        for (t, &filled) in self.header.tensors().iter().zip(&self.filled) {
            if filled < t.nbytes() {
                return Err(Error::Incomplete { name: t.spec.name.clone(), missing: t.nbytes() - filled });
            }
        }
        self.temp.persist()
    }
}

/// A file that vanishes unless it is kept.
#[derive(Debug)]
struct Temp {
    file: File,
    path: PathBuf,
    target: PathBuf,
    /// The process that made it: a forked child that drops its copy must not remove the parent's file.
    pid: u32,
    kept: bool,
}

impl Temp {
    fn create(target: &Path) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let (target, permissions) = match fs::metadata(target) {
            Ok(m) if m.is_file() => (fs::canonicalize(target)?, Some(m.permissions())),
            Ok(_) => return Err(Error::NotAFile(target.into())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => (target.to_path_buf(), None),
            Err(e) => return Err(e.into()),
        };
        let pid = std::process::id();
        let folder = match target.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".nibblas-{pid}-{n}.tmp"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let temp = Self { file, path, target, pid, kept: false };
                    if let Some(p) = permissions {
                        temp.file.set_permissions(p)?;
                    }
                    return Ok(temp);
                }
                // Left by a process of the same number that was killed; take the next name.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn persist(mut self) -> Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        self.kept = true;
        // The rename itself reaches the disk with its folder; some file systems cannot flush one, and the file is
        // already whole under its name, so a refusal here is no failure.
        #[cfg(unix)]
        if let Ok(folder) =
            File::open(self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
        {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.kept && self.pid == std::process::id() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
