//! Unpacking a foreign archive: the part that runs inside the worker.
//!
//! The archive is a tar stream, plain or compressed by gzip, xz, zstd or bzip2 (told by its first bytes; nothing else is
//! probed). Each path is taken apart here and each step below the destination is opened with `openat2` beneath it and
//! without symbolic links, so that neither `..` nor a link made by an earlier entry leads elsewhere. The namespace around
//! it would stop what this misses; this exists so that the user reads what is wrong with the file.

use crate::{machine, metadata};
use karst_model::{Error, ErrorKind, Result, image::Application, template};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timestamps, XattrFlags},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    rc::Rc,
};

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

/// Layers of an image that are applied over each other.
pub struct Layers<'a> {
    out: OwnedFd,
    field: &'a str,
    bounds: Bounds,
    found: Found,
}

impl<'a> Layers<'a> {
    /// None yet.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn new(out: &Path, field: &'a str, bounds: Bounds) -> Result<Self> {
        let out = rustix::fs::open(out, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(io::Error::from)?;
        rustix::fs::mkdirat(&out, "tree", Mode::from(0o755)).map_err(io::Error::from)?;
        Ok(Self { out, field, bounds, found: Found::default() })
    }

    /// Applies the next one: an archive, compressed or not, with whiteouts of what lies below.
    ///
    /// # Errors
    /// As [`unpack`].
    pub fn apply(&mut self, input: impl Read) -> Result<()> {
        let tree = rustix::fs::openat(
            &self.out,
            "tree",
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let tree = tree.map_err(io::Error::from)?;
        let mut w = Unpacker {
            root: &self.out,
            field: self.field,
            within: None,
            beside: None,
            bounds: self.bounds,
            found: std::mem::take(&mut self.found),
            dirs: vec![],
            parent: None,
            layer: Some(Layer { tree, seen: HashSet::new() }),
            machine: None,
        };
        w.archive(input, Part::Root)?;
        self.found = w.found;
        Ok(())
    }

    /// A file of the tree, at most 1 MiB of it.
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        let tree =
            rustix::fs::openat(&self.out, "tree", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat2(&tree, path, flags, Mode::empty(), resolve).ok()?);
        let mut text = vec![];
        file.metadata().ok().filter(|m| m.is_file())?;
        file.take(1 << 20).read_to_end(&mut text).ok()?;
        Some(text)
    }

    /// Makes the directories at which a container's own file systems are mounted, where no layer brought them.
    ///
    /// # Errors
    /// Invalid when something else is there.
    pub fn complete(&self) -> Result<()> {
        for (name, mode) in
            [("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777)]
        {
            let path = format!("tree/{name}");
            match rustix::fs::mkdirat(&self.out, &path, Mode::from(mode)) {
                Ok(()) => {
                    // The mask of the process is not the image's.
                    rustix::fs::chmodat(&self.out, &path, Mode::from(mode), AtFlags::empty())
                        .map_err(io::Error::from)?;
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        Ok(())
    }

    /// What was found in all of them.
    pub fn found(self) -> Found {
        self.found
    }
}

/// A layer that is being applied.
struct Layer {
    tree: OwnedFd,
    /// What it brought itself, which its whiteouts do not mean.
    seen: HashSet<Vec<u8>>,
}

/// Counts what comes through and remembers the last 512 bytes.
struct Tail<R> {
    inner: R,
    last: [u8; 512],
    total: u64,
    consumed: Rc<Cell<u64>>,
    ratio: u64,
}

/// Counts the bytes of the archive itself.
struct Counted<R> {
    inner: R,
    consumed: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.consumed.set(self.consumed.get() + n as u64);
        Ok(n)
    }
}

impl<R: Read> Read for Tail<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.total += n as u64;
        if self.total > 256 << 20 && self.total / self.ratio > self.consumed.get() {
            return Err(io::Error::other("the data unpacks to implausibly much"));
        }
        if n >= 512 {
            self.last.copy_from_slice(&buffer[n - 512..n]);
        } else if n > 0 {
            self.last.copy_within(n.., 0);
            self.last[512 - n..].copy_from_slice(&buffer[..n]);
        }
        Ok(n)
    }
}

pub(crate) fn decompress<'a>(mut input: impl Read + 'a, field: &str) -> Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    input.by_ref().take(6).read_to_end(&mut magic)?;
    let whole = io::BufReader::with_capacity(256 << 10, io::Cursor::new(magic.clone()).chain(input));
    let unreadable = |e: io::Error| Error::invalid(field, "the compressed data is corrupt").with_context(e);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let flags = xz2::stream::CONCATENATED;
            let stream = xz2::stream::Stream::new_stream_decoder(1 << 30, flags)
                .map_err(|e| unreadable(io::Error::other(e)))?;
            Box::new(xz2::bufread::XzDecoder::new_stream(whole, stream))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut d = zstd::stream::read::Decoder::with_buffer(whole).map_err(unreadable)?;
            d.window_log_max(29).map_err(unreadable)?;
            Box::new(d)
        }
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(whole)),
        [b'h', b's', b'q', b's', ..] => {
            return Err(Error::invalid(
                field,
                "this is a squashfs image; it can only be the rootfs part of a split image",
            ));
        }
        _ => Box::new(whole),
    })
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

    /// The tree's own directory, as a layer has it.
    fn top<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<()> {
        let attributes = self.attributes(entry)?;
        let mode = entry.header().mode().map_err(|e| self.broken(e))? & 0o7777;
        match (&self.layer, entry.header().entry_type()) {
            (Some(layer), tar::EntryType::Directory) => self.own(&layer.tree, &attributes, mode, b"/"),
            _ => Err(self.invalid("the top of a layer is no directory")),
        }
    }

    /// Acts on a mark that something of the layers below is not there; is it one?
    fn whiteout(&mut self, path: &[u8]) -> Result<bool> {
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |i| i + 1);
        let (above, name) = (&path[..at.saturating_sub(1)], &path[at..]);
        let Some(gone) = name.strip_prefix(b".wh.".as_slice()) else {
            if let Some(layer) = &mut self.layer {
                layer.seen.insert(path.to_vec());
            }
            return Ok(false);
        };
        self.parent = None;
        let opened = self.open_beneath(above, OFlags::RDONLY | OFlags::DIRECTORY);
        let directory = match opened {
            // What is not there needs not to go.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(true),
            r => self.store(r, path)?,
        };
        match gone {
            b".wh..opq" => self.clear_below(&directory, above)?,
            // Other marks of aufs mean nothing.
            _ if gone.starts_with(b".wh.") => {}
            b"" | b"." | b".." => return Err(self.invalid(format!("{:?} names nothing", show(path)))),
            name => self.clear_one(&directory, name, &[above, b"/", name].concat())?,
        }
        Ok(true)
    }

    /// Removes what lies in a directory and does not come from this layer.
    fn clear_below(&self, directory: &OwnedFd, path: &[u8]) -> Result<()> {
        let mut names = vec![];
        let list = rustix::fs::Dir::read_from(directory);
        for entry in self.store(list, path)? {
            let name = self.store(entry, path)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.iter().try_for_each(|name| self.clear_one(directory, name, &[path, b"/", name].concat()))
    }

    /// Removes what has this name and does not come from this layer.
    fn clear_one(&self, directory: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        let own = self.layer.as_ref().is_some_and(|l| l.seen.contains(path));
        self.clear_entry(directory, name, path, own)
    }

    /// As [`Self::clear_one`]; `own` tells whether it comes from this layer.
    fn clear_entry(&self, directory: &OwnedFd, name: &[u8], path: &[u8], own: bool) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(inner) => {
                self.clear_below(&inner, path)?;
                if own {
                    return Ok(());
                }
                // Not empty: something of this layer is in it.
                match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => Ok(()),
                    r => self.store(r, path),
                }
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) if own => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => match rustix::fs::unlinkat(directory, name, AtFlags::empty())
            {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                r => self.store(r, path),
            },
            Err(e) => self.store(Err(e), path),
        }
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

    fn node<R: Read>(&mut self, mut entry: tar::Entry<'_, R>, path: &[u8], part: Part) -> Result<()> {
        let attributes = self.attributes(&mut entry)?;
        let kind = entry.header().entry_type();
        let (size, mode) = (entry.size(), entry.header().mode().map_err(|e| self.broken(e))? & 0o7777);
        let link = entry.link_name_bytes().map(|l| l.into_owned());
        let (parent, name) = {
            // Borrowing self for the cached descriptor would lock it; a duplicate is cheap beside creating a file.
            let (parent, name) = self.parent(path)?;
            (rustix::io::fcntl_dupfd_cloexec(parent, 0).map_err(io::Error::from)?, name)
        };
        let clear = |this: &Self| match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) if this.layer.is_some() => {
                // What this layer says now of the name, it says instead of a directory below.
                this.clear_entry(&parent, name, path, false)?;
                match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => Ok(()),
                    _ => Err(this.invalid(format!("{:?} replaces a directory of its own layer", show(path)))),
                }
            }
            Err(Errno::ISDIR) => Err(this.invalid(format!("{:?} replaces a directory", show(path)))),
            Err(e) => this.store(Err(e), path),
        };
        match kind {
            tar::EntryType::Directory => {
                match rustix::fs::mkdirat(&parent, name, Mode::from(0o700)) {
                    Err(Errno::EXIST) if self.layer.is_some() && !name.is_empty() => {
                        let found = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW);
                        let mode = self.store(found, path)?.st_mode;
                        if FileType::from_raw_mode(mode) != FileType::Directory {
                            clear(self)?;
                            self.store(rustix::fs::mkdirat(&parent, name, Mode::from(0o700)), path)?;
                            self.parent = None;
                        }
                    }
                    Err(Errno::EXIST) => {}
                    r => self.store(r, path)?,
                }
                let opened = self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY);
                let fd = self.store(opened, path)?;
                self.own(&fd, &attributes, mode, path)?;
                self.dirs.push((path.to_vec(), attributes.mtime));
            }
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                clear(self)?;
                let room = self.bounds.bytes.saturating_sub(self.found.bytes);
                if size > room {
                    return Err(self.invalid(format!(
                        "the files of the archive are larger than {} bytes together",
                        self.bounds.bytes
                    )));
                }
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
                let fd = self.store(rustix::fs::openat(&parent, name, flags, Mode::from(0o600)), path)?;
                let mut file = File::from(fd);
                let written = self.content(&mut entry, &mut file)?;
                if written != size {
                    return Err(self.invalid("the archive is cut off inside a file"));
                }
                self.found.bytes += size;
                self.own(&file, &attributes, mode, path)?;
                let times = times(attributes.mtime);
                self.store(rustix::fs::futimens(&file, &times), path)?;
            }
            tar::EntryType::Link => {
                let target = self.clean(link.as_deref().unwrap_or_default(), part)?;
                let target =
                    self.place(part, &target).filter(|t| t.starts_with(b"tree/")).ok_or_else(|| {
                        self.invalid(format!("{:?} is a hard link out of the image", show(path)))
                    })?;
                clear(self)?;
                let at = target.iter().rposition(|b| *b == b'/').unwrap_or(0);
                let opened = self.open_beneath(&target[..at], OFlags::PATH | OFlags::DIRECTORY);
                let holder = match opened {
                    Err(Errno::NOENT) => return Err(self.dangling(path)),
                    r => self.store(r, path)?,
                };
                match rustix::fs::linkat(&holder, &target[at + 1..], &parent, name, AtFlags::empty()) {
                    Err(Errno::NOENT | Errno::PERM) => return Err(self.dangling(path)),
                    r => self.store(r, path)?,
                }
            }
            tar::EntryType::Symlink => {
                clear(self)?;
                let target = link.unwrap_or_default();
                if target.is_empty() || target.len() > 4095 || target.contains(&0) {
                    return Err(
                        self.invalid(format!("{:?} is a symbolic link without a usable target", show(path)))
                    );
                }
                self.store(rustix::fs::symlinkat(target.as_slice(), &parent, name), path)?;
                let (uid, gid) = attributes.owner();
                let owned = rustix::fs::chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
                self.store(owned, path)?;
                let times = times(attributes.mtime);
                let timed = rustix::fs::utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW);
                self.store(timed, path)?;
            }
            tar::EntryType::Fifo => {
                clear(self)?;
                let made = rustix::fs::mknodat(&parent, name, FileType::Fifo, Mode::from(mode), 0);
                self.store(made, path)?;
                let (uid, gid) = attributes.owner();
                let owned = rustix::fs::chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
                self.store(owned, path)?;
            }
            // Root file systems carry a few nodes in /dev, which a container never sees: it gets its own. They are
            // left out, as Incus does; anywhere else a device node is an attack or a mistake.
            tar::EntryType::Char | tar::EntryType::Block if path.starts_with(b"tree/dev/") => {}
            tar::EntryType::Char | tar::EntryType::Block => {
                return Err(
                    self.invalid(format!("{:?} is a device node; an image may not bring any", show(path)))
                );
            }
            _ => {
                return Err(self.invalid(format!("{:?} is of a kind that images do not have", show(path))));
            }
        }
        Ok(())
    }

    fn dangling(&self, path: &[u8]) -> Error {
        self.invalid(format!("{:?} is a hard link to a file that the archive does not have", show(path)))
    }

    fn content<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, file: &mut File) -> Result<u64> {
        let mut buffer = vec![0u8; 128 << 10];
        let (mut at, mut hole) = (0u64, 0u64);
        loop {
            let mut filled = 0;
            while filled < buffer.len() {
                match entry.read(&mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(self.broken(e)),
                }
            }
            if filled == 0 {
                break;
            }
            for chunk in buffer[..filled].chunks(4096) {
                if chunk.len() == 4096 && chunk.iter().all(|b| *b == 0) {
                    hole += 4096;
                    continue;
                }
                if hole > 0 {
                    file.seek(SeekFrom::Current(hole as i64))?;
                    hole = 0;
                }
                file.write_all(chunk)?;
            }
            at += filled as u64;
        }
        if hole > 0 {
            file.set_len(at)?;
        }
        Ok(at)
    }

    fn attributes<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<Attributes> {
        let header = entry.header();
        let mut a = Attributes {
            uid: header.uid().map_err(|e| self.broken(e))?,
            gid: header.gid().map_err(|e| self.broken(e))?,
            mtime: header.mtime().map_err(|e| self.broken(e))? as i64,
            xattrs: BTreeMap::new(),
        };
        if let Some(pax) = entry.pax_extensions().map_err(|e| self.broken(e))? {
            for record in pax {
                let record = record.map_err(|e| self.broken(e))?;
                let (key, value) = (record.key_bytes(), record.value_bytes());
                let number =
                    || std::str::from_utf8(value).ok().and_then(|v| v.split('.').next()?.parse::<i64>().ok());
                match key {
                    b"uid" => a.uid = number().unwrap_or(-1) as u64,
                    b"gid" => a.gid = number().unwrap_or(-1) as u64,
                    b"mtime" => a.mtime = number().unwrap_or(a.mtime),
                    _ if key.starts_with(b"GNU.sparse.") => {
                        return Err(self.invalid(
                            "the archive uses GNU's PAX form of sparse files; pack it without --sparse",
                        ));
                    }
                    _ => {
                        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                            let kept = name == b"security.capability"
                                || name.starts_with(b"user.")
                                || name.starts_with(b"system.posix_acl_");
                            if kept && value.len() <= 64 << 10 && a.xattrs.len() < 64 {
                                a.xattrs.insert(name.to_vec(), value.to_vec());
                            }
                        }
                    }
                }
            }
        }
        if a.uid >= u64::from(karst_host::sandbox::ID_COUNT)
            || a.gid >= u64::from(karst_host::sandbox::ID_COUNT)
        {
            return Err(
                self.invalid("a file's owner is not in 0..65535; pack the root file system with its own ids")
            );
        }
        Ok(a)
    }

    /// Owner first: changing it clears setuid bits and file capabilities.
    fn own(&self, fd: impl AsFd, a: &Attributes, mode: u32, path: &[u8]) -> Result<()> {
        let (uid, gid) = a.owner();
        self.store(rustix::fs::fchown(&fd, uid, gid), path)?;
        self.store(rustix::fs::fchmod(&fd, Mode::from(mode)), path)?;
        for (name, value) in &a.xattrs {
            match rustix::fs::fsetxattr(&fd, name.as_slice(), value, XattrFlags::empty()) {
                Err(Errno::OPNOTSUPP) => {}
                Err(Errno::INVAL | Errno::PERM) => {
                    return Err(self.invalid(format!("{:?} has an invalid extended attribute", show(path))));
                }
                r => self.store(r, path)?,
            }
        }
        Ok(())
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

struct Attributes {
    uid: u64,
    gid: u64,
    mtime: i64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Attributes {
    fn owner(&self) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
        (Some(rustix::fs::Uid::from_raw(self.uid as u32)), Some(rustix::fs::Gid::from_raw(self.gid as u32)))
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
            Err(Error { kind, message, field, context }) => Self::Failed { kind, message, field, context },
        }
    }
}

impl From<Answer> for Result<Found> {
    fn from(a: Answer) -> Self {
        match a {
            Answer::Done(f) => Ok(f),
            Answer::Failed { kind, message, field, context } => Err(Error { kind, message, field, context }),
        }
    }
}
