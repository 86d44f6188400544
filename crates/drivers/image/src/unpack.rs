//! Unpacking a foreign archive: the part that runs inside the worker.
//!
//! The archive is a tar stream, plain or compressed by gzip, xz, zstd or bzip2 (told by its first bytes; nothing else is
//! probed). Each path is taken apart here and each step below the destination is opened with `openat2` beneath it and
//! without symbolic links, so that neither `..` nor a link made by an earlier entry leads elsewhere. The namespace around
//! it would stop what this misses; this exists so that the user reads what is wrong with the file.

mod layers;
mod nodes;
mod stream;

pub use layers::Layers;
pub(crate) use stream::decompress;

use crate::{machine, metadata};
use karst_model::{Error, ErrorKind, Result, image::Application, template};
use layers::Layer;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, Timestamps},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    cell::Cell,
    collections::BTreeMap,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    rc::Rc,
};
use stream::{Counted, Tail};

/// Bounds of an archive.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Bounds {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Number of entries.
    pub entries: u64,
    /// Unpacked bytes for each byte of the archive, checked from 256 MiB on.
    pub ratio: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { bytes: 256 << 30, entries: 2_000_000, ratio: 1000 }
    }
}

/// What the archive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// `metadata.yaml`, `templates/` and `rootfs/` or `rootfs.img`.
    Unified,
    /// `metadata.yaml` and `templates/`.
    Metadata,
    /// A root file system.
    Root,
    /// One file, the disk that [`Task::within`] names.
    Disk,
}

/// The worker's task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    /// What comes on standard input.
    pub part: Part,
    /// Bounds.
    pub bounds: Bounds,
    /// The file's name in the user's vocabulary (`image`, `metadata`, `rootfs`), named in errors.
    pub field: String,
    /// What lies below this path of the archive only, as if that were its top; everything else is passed over.
    #[serde(default)]
    pub within: Option<String>,
    /// Directory of the archive whose `metadata.yaml` and `templates/` are answered as well.
    #[serde(default)]
    pub beside: Option<String>,
    /// What a virtual machine is beside its disk is taken as well.
    #[serde(default)]
    pub machine: Option<machine::Wanted>,
}

/// What the worker found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Found {
    /// Parsed `metadata.yaml`.
    pub metadata: Option<metadata::Metadata>,
    /// Texts of `templates/`, by name.
    #[serde(default)]
    pub templates: BTreeMap<String, String>,
    /// A `rootfs/` tree was stored.
    pub tree: bool,
    /// A `rootfs.img` was stored.
    pub disk: bool,
    /// Entries stored.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Of an image of the OCI: the digest of its manifest, and how it is run.
    #[serde(default)]
    pub digest: Option<String>,
    /// See `digest`.
    #[serde(default)]
    pub application: Option<Application>,
}

/// Unpacks `input` below the directory `out`: the root file system into `tree/`, the disk into `rootfs.img`;
/// templates are answered.
///
/// # Errors
/// Invalid for anything wrong with the archive, quota when the disk is full.
pub fn unpack(input: impl Read, out: &Path, task: &Task) -> Result<Found> {
    let field = task.field.as_str();
    let root = rustix::fs::open(out, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)?;
    let mut w = Unpacker {
        root: &root,
        field,
        within: task.within.as_ref().map(String::as_bytes),
        beside: task.beside.as_ref().map(String::as_bytes),
        bounds: task.bounds,
        found: Found::default(),
        dirs: vec![],
        parent: None,
        layer: None,
        machine: task.machine.as_ref().map(|m| machine::Taken::new(m, field)),
    };
    w.archive(input, task.part)?;
    let found = w.found;
    if let Some(machine) = w.machine {
        machine.store()?;
    }
    match task.part {
        Part::Unified | Part::Metadata if found.metadata.is_none() => {
            Err(Error::invalid(field, "the archive has no metadata.yaml; this is not an Incus image"))
        }
        Part::Unified if !found.tree && !found.disk => {
            Err(Error::invalid(field, "the archive has neither rootfs/ nor rootfs.img"))
        }
        Part::Unified if found.tree && found.disk => {
            Err(Error::invalid(field, "the archive has both rootfs/ and rootfs.img"))
        }
        Part::Root | Part::Disk if !found.tree && !found.disk => Err(match &task.within {
            Some(within) => Error::invalid(field, format!("the archive has no {within}")),
            None => Error::invalid(field, "the archive is empty"),
        }),
        _ => Ok(found),
    }
}

struct Unpacker<'a> {
    root: &'a OwnedFd,
    field: &'a str,
    within: Option<&'a [u8]>,
    beside: Option<&'a [u8]>,
    bounds: Bounds,
    found: Found,
    /// Directories and their times, set when nothing is stored in them any more.
    dirs: Vec<(Vec<u8>, i64)>,
    parent: Option<(Vec<u8>, OwnedFd)>,
    layer: Option<Layer>,
    machine: Option<machine::Taken<'a>>,
}

impl Unpacker<'_> {
    /// Stores a whole archive.
    fn archive(&mut self, input: impl Read, part: Part) -> Result<()> {
        let consumed = Rc::new(Cell::new(0));
        let input = Counted { inner: input, consumed: consumed.clone() };
        let inner = decompress(input, self.field)?;
        let mut stream = Tail { inner, last: [1; 512], total: 0, consumed, ratio: self.bounds.ratio };
        {
            let mut archive = tar::Archive::new(&mut stream);
            archive.set_ignore_zeros(false);
            let entries = archive.entries().map_err(|e| self.broken(e))?;
            for entry in entries {
                let entry = entry.map_err(|e| self.broken(e))?;
                self.entry(entry, part)?;
            }
        }
        if stream.last.iter().any(|b| *b != 0) {
            return Err(self.invalid("the archive is cut off: it has no end mark"));
        }
        // What follows the end mark is padding; reading it lets the decompressor verify its checksum.
        let mut rest = vec![0; 64 << 10];
        let mut drained = 0u64;
        loop {
            match stream.read(&mut rest) {
                Ok(0) => break,
                Ok(n) if drained < 64 << 20 => drained += n as u64,
                Ok(_) => return Err(self.invalid("much data follows the end of the archive")),
                Err(e) => return Err(self.broken(e)),
            }
        }
        self.finish()
    }

    fn invalid(&self, what: impl Into<String>) -> Error {
        Error::invalid(self.field, what)
    }

    /// Reading failed: the archive's fault unless the system says otherwise.
    fn broken(&self, e: io::Error) -> Error {
        match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => e.into(),
            _ => self.invalid("the archive is corrupt or cut off").with_context(e),
        }
    }

    fn store<T>(&self, r: rustix::io::Result<T>, path: &[u8]) -> Result<T> {
        r.map_err(|e| match e {
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => io::Error::from(e).into(),
            Errno::LOOP | Errno::XDEV | Errno::NOTDIR => {
                self.invalid(format!("{:?} leads through a symbolic link or a file", show(path)))
            }
            Errno::NAMETOOLONG => self.invalid(format!("{:?} is too long a name", show(path))),
            _ => Error::internal("a file of the image could not be stored", format!("{}: {e}", show(path))),
        })
    }

    fn entry<R: Read>(&mut self, mut entry: tar::Entry<'_, R>, part: Part) -> Result<()> {
        self.found.entries += 1;
        if self.found.entries > self.bounds.entries {
            return Err(self.invalid(format!("the archive has more than {} entries", self.bounds.entries)));
        }
        let path = self.clean(&entry.path_bytes(), part)?;
        if let Some([b'/', own @ ..]) = self.beside.and_then(|dir| path.strip_prefix(dir)) {
            match own.strip_prefix(b"templates".as_slice()) {
                _ if own == b"metadata.yaml" => return self.metadata(entry),
                Some(name) => return self.template(entry, name),
                None => {}
            }
        }
        if let Some(machine) = &mut self.machine {
            machine.entry(&path, &mut entry)?;
        }
        let Some(inside) = self.place(part, &path) else {
            if path == b"metadata.yaml" && part != Part::Root {
                return self.metadata(entry);
            }
            return Ok(()); // other entries of the archive's top mean nothing here
        };
        if let Some(name) = inside.strip_prefix(b"templates".as_slice()) {
            return self.template(entry, name);
        }
        if inside == b"rootfs.img" || inside == b"disk.img" {
            if matches!(entry.header().entry_type(), tar::EntryType::Regular | tar::EntryType::GNUSparse) {
                self.found.disk = true;
            } else {
                return Err(self.invalid("the disk is not a file"));
            }
        } else if inside.starts_with(b"tree") {
            self.found.tree = true;
        }
        if self.layer.is_some() && inside == b"tree" {
            return self.top(&mut entry);
        }
        if self.layer.is_some() && self.whiteout(&inside)? {
            return Ok(());
        }
        self.node(entry, &inside, part)
    }

    fn metadata<R: Read>(&mut self, mut entry: tar::Entry<'_, R>) -> Result<()> {
        let mut text = Vec::new();
        entry.by_ref().take((1 << 20) + 1).read_to_end(&mut text).map_err(|e| self.broken(e))?;
        if text.len() > 1 << 20 {
            return Err(self.invalid("metadata.yaml is larger than 1 MiB"));
        }
        self.found.metadata = Some(metadata::Metadata::parse(self.field, &text)?);
        Ok(())
    }

    /// A template: its text, by its name.
    fn template<R: Read>(&mut self, mut entry: tar::Entry<'_, R>, name: &[u8]) -> Result<()> {
        let kind = entry.header().entry_type();
        let name = match (kind, name) {
            (tar::EntryType::Directory, _) => return Ok(()),
            (tar::EntryType::Regular | tar::EntryType::Continuous, [b'/', name @ ..]) => show(name),
            _ => return Err(self.invalid(format!("templates{} is not a file", show(name)))),
        };
        template::check_name(self.field, &name)?;
        let mut text = Vec::new();
        let most = template::MAX_BYTES as u64 + 1;
        entry.by_ref().take(most).read_to_end(&mut text).map_err(|e| self.broken(e))?;
        let known: usize = self.found.templates.values().map(String::len).sum();
        if known + text.len() > template::MAX_BYTES || self.found.templates.len() > 64 {
            let text =
                format!("its templates are more than 64, or more than {} KiB", template::MAX_BYTES >> 10);
            return Err(self.invalid(text));
        }
        let text = String::from_utf8(text)
            .map_err(|_| self.invalid(format!("the template {name:?} is not UTF-8")))?;
        self.found.templates.insert(name, text);
        Ok(())
    }

    /// Where an entry goes below the destination; `None` when nowhere.
    fn place(&self, part: Part, path: &[u8]) -> Option<Vec<u8>> {
        match self.within {
            None => place(part, path),
            Some(within) => match path.strip_prefix(within)? {
                [] => place(part, b""),
                [b'/', rest @ ..] => place(part, rest),
                _ => None,
            },
        }
    }

    /// The path as components below the archive's top. A leading slash is dropped, as `tar` drops it, where the rest
    /// lies in the image; where it does not, the archive means the host.
    fn clean(&self, raw: &[u8], part: Part) -> Result<Vec<u8>> {
        let mut parts = Vec::new();
        for part in raw.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(self.invalid(format!("{:?} leads out of the image", show(raw)))),
                _ if part.contains(&0) => return Err(self.invalid("a path has a NUL character")),
                _ => parts.push(part),
            }
        }
        if parts.len() > 200 || raw.len() > 4096 {
            return Err(self.invalid(format!("{:?}… is too deep a path", show(&raw[..raw.len().min(80)]))));
        }
        let path = parts.join(&b'/');
        if raw.first() == Some(&b'/') && place(part, &path).is_none() {
            return Err(self.invalid(format!("{:?} is an absolute path", show(raw))));
        }
        Ok(path)
    }

    fn open_beneath(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        if let Some(layer) = &self.layer {
            // A link that a layer below made (`/lib`) is followed, within the tree.
            let path = path.strip_prefix(b"tree".as_slice()).unwrap_or(path);
            let path = path.strip_prefix(b"/".as_slice()).unwrap_or(path);
            let path = if path.is_empty() { b".".as_slice() } else { path };
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            return rustix::fs::openat2(&layer.tree, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { b".".as_slice() } else { path };
        rustix::fs::openat2(self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// The directory that holds `path`, made when missing, and the last component.
    fn parent<'p>(&mut self, path: &'p [u8]) -> Result<(BorrowedFd<'_>, &'p [u8])> {
        let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(i) => (&path[..i], &path[i + 1..]),
            None => (b"".as_slice(), path),
        };
        if self.parent.as_ref().is_none_or(|(p, _)| p != parent) {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let fd = match self.open_beneath(parent, flags) {
                Err(Errno::NOENT) => {
                    let (above, last) = self.parent(parent)?;
                    let made = rustix::fs::mkdirat(above, last, Mode::from(0o755));
                    self.store(made, path)?;
                    self.open_beneath(parent, flags)
                }
                r => r,
            };
            let fd = self.store(fd, path)?;
            self.parent = Some((parent.to_vec(), fd));
        }
        let (_, fd) = self.parent.as_ref().expect("set above");
        Ok((fd.as_fd(), name))
    }

    fn finish(&mut self) -> Result<()> {
        for (path, mtime) in std::mem::take(&mut self.dirs).iter().rev() {
            let opened = self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY);
            let fd = match opened {
                // Replaced later in the same layer.
                Err(Errno::NOENT | Errno::NOTDIR) if self.layer.is_some() => continue,
                r => self.store(r, path)?,
            };
            self.store(rustix::fs::futimens(&fd, &times(*mtime)), path)?;
        }
        Ok(())
    }
}

/// Where an entry goes below the destination; `None` when nowhere.
fn place(part: Part, path: &[u8]) -> Option<Vec<u8>> {
    let below = |prefix: &[u8], to: &[u8]| match path.strip_prefix(prefix)? {
        [] => Some(to.to_vec()),
        [b'/', rest @ ..] => Some([to, b"/", rest].concat()),
        _ => None,
    };
    match part {
        Part::Disk => path.is_empty().then(|| b"disk.img".to_vec()),
        Part::Root if path.is_empty() => Some(b"tree".to_vec()),
        Part::Root => Some([b"tree/".as_slice(), path].concat()),
        Part::Metadata => below(b"templates", b"templates"),
        Part::Unified if path == b"rootfs.img" => Some(path.to_vec()),
        Part::Unified => below(b"rootfs", b"tree").or_else(|| below(b"templates", b"templates")),
    }
}

fn times(mtime: i64) -> Timestamps {
    let t = rustix::fs::Timespec { tv_sec: mtime, tv_nsec: 0 };
    Timestamps { last_access: t, last_modification: t }
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path.strip_prefix(b"tree/").unwrap_or(path)).into_owned()
}

/// What the worker writes on its standard output.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done(Found),
    /// Not done.
    Failed {
        /// Class.
        kind: ErrorKind,
        /// Public text.
        message: String,
        /// Field.
        field: Option<String>,
        /// Private context.
        context: Option<String>,
    },
}

impl From<Result<Found>> for Answer {
    fn from(r: Result<Found>) -> Self {
        match r {
            Ok(f) => Self::Done(f),
            Err(Error { kind, message, field, context, .. }) => {
                Self::Failed { kind, message, field, context }
            }
        }
    }
}

impl From<Answer> for Result<Found> {
    fn from(a: Answer) -> Self {
        match a {
            Answer::Done(f) => Ok(f),
            Answer::Failed { kind, message, field, context } => {
                Err(Error { field, context, ..Error::new(kind, message) })
            }
        }
    }
}
