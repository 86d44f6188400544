//! Packing a tree as a tar stream (POSIX.1-2001 pax, `ustar` headers), and storing a stream as a sparse file: the parts of
//! moving volumes that run inside the worker.
//!
//! The tree may belong to a guest that runs: what vanishes meanwhile is left out, and a file that shrinks is filled up with
//! zeros to the size that its header said. Sockets are left out, as tar does. Holes travel as zeros.

use karst_model::{Error, Result};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags},
    io::Errno,
};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::Path,
};

/// Packs the tree `root` into `out`, paths relative to it; entries in the order of their names.
///
/// # Errors
/// The tree cannot be read, or nobody reads `out` any more.
pub fn pack(root: &Path, out: impl Write) -> Result<()> {
    let mut out = io::BufWriter::with_capacity(256 << 10, out);
    pack_below(root, "", &mut out)?;
    // Two empty blocks end it.
    out.write_all(&[0; 1024])?;
    Ok(out.flush()?)
}

/// Packs the tree `root` into `out` below `prefix` (empty: relative to it), without the end mark of an archive.
///
/// # Errors
/// As [`pack`].
pub(crate) fn pack_below(root: &Path, prefix: &str, out: &mut impl Write) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty()).map_err(io::Error::from)?;
    let prefix = if prefix.is_empty() { vec![] } else { [prefix.as_bytes(), b"/"].concat() };
    Packer { root, prefix, out, links: HashMap::new(), buffer: vec![0; 256 << 10] }.tree()
}

pub(crate) struct Packer<'a, W> {
    root: OwnedFd,
    /// Before each path; empty or with a slash at its end.
    prefix: Vec<u8>,
    out: &'a mut W,
    /// Files with several names: (device, inode) to the first.
    links: HashMap<(u32, u32, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

impl<W: Write> Packer<'_, W> {
    fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b".".as_slice() } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    fn tree(&mut self) -> Result<()> {
        // Paths, not descriptors: a tree may be deeper than a process may have descriptors.
        let mut waiting: Vec<Vec<u8>> = vec![vec![]];
        while let Some(path) = waiting.pop() {
            let directory = match self.open(&path, OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !path.is_empty() => continue,
                other => other.map_err(io::Error::from)?,
            };
            let stat = rustix::fs::statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
                .map_err(io::Error::from)?;
            let name = match (path.is_empty(), self.prefix.is_empty()) {
                (true, true) => b"./".to_vec(),
                (true, false) => self.prefix.clone(),
                (false, _) => [self.prefix.as_slice(), &path, b"/"].concat(),
            };
            self.header(&name, b'5', &stat, 0, &[], &attributes(&directory)?)?;
            let mut below = vec![];
            let mut names = vec![];
            for entry in Dir::read_from(&directory).map_err(io::Error::from)? {
                let entry = entry.map_err(io::Error::from)?;
                let name = entry.file_name();
                if name != c"." && name != c".." {
                    names.push(name.to_owned());
                }
            }
            names.sort();
            for name in names {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                let stat = match rustix::fs::statx(&directory, &name, flags, StatxFlags::BASIC_STATS) {
                    Err(Errno::NOENT) => continue,
                    other => other.map_err(io::Error::from)?,
                };
                let full = match path.is_empty() {
                    true => name.to_bytes().to_vec(),
                    false => [path.as_slice(), b"/", name.to_bytes()].concat(),
                };
                if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory {
                    below.push(full);
                } else {
                    self.leaf(&directory, &name, &[self.prefix.as_slice(), &full].concat(), &stat)?;
                }
            }
            // The last one first, so that they come out in order.
            waiting.extend(below.into_iter().rev());
        }
        Ok(())
    }

    fn leaf(&mut self, dir: &OwnedFd, name: &std::ffi::CStr, path: &[u8], stat: &Statx) -> Result<()> {
        if stat.stx_nlink > 1 {
            let key = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
            if let Some(first) = self.links.get(&key).cloned() {
                return self.header(path, b'1', stat, 0, &first, &[]);
            }
            self.links.insert(key, path.to_vec());
        }
        match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let mut file: File = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                    Err(Errno::NOENT | Errno::LOOP) => {
                        self.links.retain(|_, first| first != path);
                        return Ok(());
                    }
                    other => other.map_err(io::Error::from)?.into(),
                };
                let stat = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
                    .map_err(io::Error::from)?;
                let size = stat.stx_size;
                self.header(path, b'0', &stat, size, &[], &attributes(&file)?)?;
                let mut left = size;
                while left > 0 {
                    let room = (self.buffer.len() as u64).min(left) as usize;
                    let n = match file.read(&mut self.buffer[..room]) {
                        Ok(0) => {
                            self.buffer[..room].fill(0); // it became shorter
                            room
                        }
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                        other => other?,
                    };
                    self.out.write_all(&self.buffer[..n])?;
                    left -= n as u64;
                }
                let padding = size.next_multiple_of(512) - size;
                Ok(self.out.write_all(&[0; 512][..padding as usize])?)
            }
            FileType::Symlink => match rustix::fs::readlinkat(dir, name, Vec::new()) {
                Err(Errno::NOENT | Errno::INVAL) => Ok(()),
                other => {
                    let target = other.map_err(io::Error::from)?;
                    self.header(path, b'2', stat, 0, target.to_bytes(), &[])
                }
            },
            FileType::Fifo => self.header(path, b'6', stat, 0, &[], &[]),
            _ => Ok(()), // sockets; device nodes cannot be in a container's tree
        }
    }

    /// A small file, or a directory (`None`), of root, of now.
    pub(crate) fn text(out: &mut W, path: &str, text: Option<&str>) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        if path.len() > 99 {
            return Err(Error::invalid("name", format!("{path:?} is too long a path for a backup")));
        }
        let Some(text) = text else {
            return block(out, format!("{path}/").as_bytes(), b'5', [0o711, 0, 0, 0, now], b"");
        };
        let size = text.len() as u64;
        block(out, path.as_bytes(), b'0', [0o600, 0, 0, size, now], b"")?;
        out.write_all(text.as_bytes())?;
        let padding = size.next_multiple_of(512) - size;
        Ok(out.write_all(&[0; 512][..padding as usize])?)
    }

    /// A disk, its holes left out: GNU's old form of sparse files, which GNU tar, Go's archive/tar and ours read.
    pub(crate) fn disk(out: &mut W, path: &str, disk: &File) -> Result<()> {
        let size = (&mut &*disk).seek(SeekFrom::End(0))?;
        if path.len() > 100 {
            return Err(Error::invalid("name", format!("{path:?} is too long a path for a backup")));
        }
        let parts = extents(disk, size)?;
        let stored: u64 = parts.iter().map(|(from, to)| to - from).sum();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let mut head = [0u8; 512];
        head[..path.len()].copy_from_slice(path.as_bytes());
        for (at, width, value) in [
            (100, 8, 0o600),
            (108, 8, 0),
            (116, 8, 0),
            (124, 12, stored),
            (136, 12, now.unwrap_or_default().as_secs()),
        ] {
            number(&mut head[at..at + width], value);
        }
        head[156] = b'S';
        head[257..265].copy_from_slice(b"ustar  \0");
        // The map ends with an empty part at the file's end, as GNU tar writes it.
        let mut map = parts.iter().map(|(from, to)| (*from, to - from)).chain([(size, 0)]).peekable();
        fn entries(space: &mut [u8], map: &mut impl Iterator<Item = (u64, u64)>) {
            for (slot, (offset, length)) in space.chunks_exact_mut(24).zip(map) {
                number(&mut slot[..12], offset);
                number(&mut slot[12..], length);
            }
        }
        entries(&mut head[386..482], &mut map.by_ref().take(4));
        head[482] = u8::from(map.peek().is_some());
        number(&mut head[483..495], size);
        head[148..156].fill(b' ');
        let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
        head[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        out.write_all(&head)?;
        while map.peek().is_some() {
            let mut more = [0u8; 512];
            entries(&mut more[..504], &mut map.by_ref().take(21));
            more[504] = u8::from(map.peek().is_some());
            out.write_all(&more)?;
        }
        let mut buffer = vec![0u8; 1 << 20];
        for (from, to) in parts {
            let mut at = from;
            while at < to {
                let room = (buffer.len() as u64).min(to - at) as usize;
                disk.read_exact_at(&mut buffer[..room], at)?;
                out.write_all(&buffer[..room])?;
                at += room as u64;
            }
        }
        let padding = stored.next_multiple_of(512) - stored;
        Ok(out.write_all(&[0; 512][..padding as usize])?)
    }

    /// A header, after an extended one for what the plain one cannot hold.
    fn header(
        &mut self,
        path: &[u8],
        kind: u8,
        stat: &Statx,
        size: u64,
        link: &[u8],
        attributes: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<()> {
        let mut extended = vec![];
        let mut record = |key: &[u8], value: &[u8]| record(&mut extended, key, value);
        if path.len() > 100 {
            record(b"path", path);
        }
        if link.len() > 100 {
            record(b"linkpath", link);
        }
        if size >= 1 << 33 {
            record(b"size", size.to_string().as_bytes());
        }
        for (key, id) in [(b"uid", stat.stx_uid), (b"gid", stat.stx_gid)] {
            if id >= 1 << 21 {
                record(key, id.to_string().as_bytes());
            }
        }
        let mtime = stat.stx_mtime;
        if mtime.tv_nsec != 0 || mtime.tv_sec < 0 {
            record(b"mtime", format!("{}.{:09}", mtime.tv_sec, mtime.tv_nsec).as_bytes());
        }
        for (name, value) in attributes {
            record(&[b"SCHILY.xattr.".as_slice(), name].concat(), value);
        }
        if !extended.is_empty() {
            let size = extended.len() as u64;
            self.block(b"././@PaxHeader", b'x', [0o644, 0, 0, size, 0], b"")?;
            extended.resize(extended.len().next_multiple_of(512), 0);
            self.out.write_all(&extended)?;
        }
        let small = |id: u32| if id >= 1 << 21 { 0 } else { u64::from(id) };
        let numbers = [
            u64::from(stat.stx_mode) & 0o7777,
            small(stat.stx_uid),
            small(stat.stx_gid),
            if size >= 1 << 33 { 0 } else { size },
            mtime.tv_sec.clamp(0, (1 << 33) - 1) as u64,
        ];
        self.block(&path[..path.len().min(100)], kind, numbers, &link[..link.len().min(100)])
    }

    fn block(&mut self, path: &[u8], kind: u8, numbers: [u64; 5], link: &[u8]) -> Result<()> {
        block(self.out, path, kind, numbers, link)
    }
}

/// One block of 512 bytes; numbers are mode, uid, gid, size, mtime.
fn block(out: &mut impl Write, path: &[u8], kind: u8, numbers: [u64; 5], link: &[u8]) -> Result<()> {
    let mut block = [0u8; 512];
    block[..path.len()].copy_from_slice(path);
    for (at, width, value) in [
        (100, 7, numbers[0]),
        (108, 7, numbers[1]),
        (116, 7, numbers[2]),
        (124, 11, numbers[3]),
        (136, 11, numbers[4]),
    ] {
        block[at..at + width].copy_from_slice(format!("{value:0width$o}").as_bytes());
    }
    block[148..156].fill(b' ');
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    Ok(out.write_all(&block)?)
}

/// A number of a header: octal, or GNU's binary form where that is too short.
fn number(field: &mut [u8], value: u64) {
    let width = field.len() - 1;
    let text = format!("{value:0width$o}");
    if text.len() == width {
        field[..width].copy_from_slice(text.as_bytes());
        return;
    }
    field.fill(0);
    field[0] = 0x80;
    let at = field.len() - 8;
    field[at..].copy_from_slice(&value.to_be_bytes());
}

/// The parts of a disk that hold data, whole sectors of it, in order.
fn extents(disk: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut parts: Vec<(u64, u64)> = vec![];
    let mut at = 0;
    while at < size {
        let from = match rustix::fs::seek(disk, rustix::fs::SeekFrom::Data(at)) {
            Ok(from) => from,
            Err(Errno::NXIO) => break,
            // A block device, or a file system that does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return filled(disk, size),
            Err(e) => return Err(io::Error::from(e).into()),
        };
        let to = rustix::fs::seek(disk, rustix::fs::SeekFrom::Hole(from)).map_err(io::Error::from)?;
        // Readers check that all parts but the last are whole blocks.
        let (from, to) = (from & !511, to.next_multiple_of(512).min(size));
        match parts.last_mut() {
            Some(last) if from <= last.1 => last.1 = to.max(last.1),
            _ => parts.push((from, to)),
        }
        at = to;
    }
    Ok(parts)
}

/// As much as is told from zeros at a time.
const GRAIN: u64 = 64 << 10;

/// The parts of a disk that are not all zeros, by reading it: twice then, but what is packed and unpacked is no more than there is.
fn filled(disk: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    static ZEROS: [u8; GRAIN as usize] = [0; GRAIN as usize];
    let mut parts: Vec<(u64, u64)> = vec![];
    let mut buffer = vec![0u8; GRAIN as usize];
    let mut from = 0;
    while from < size {
        let to = size.min(from + GRAIN);
        let piece = &mut buffer[..(to - from) as usize];
        disk.read_exact_at(piece, from)?;
        if *piece != ZEROS[..piece.len()] {
            match parts.last_mut() {
                Some(last) if last.1 == from => last.1 = to,
                _ => parts.push((from, to)),
            }
        }
        from = to;
    }
    Ok(parts)
}

/// `LENGTH KEY=VALUE\n`, the length counting itself.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    for piece in [b" ", key, b"=", value, b"\n"] {
        out.extend_from_slice(piece);
    }
}

/// Extended attributes that belong to the content.
fn attributes(fd: impl std::os::fd::AsFd) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0u8; 64 << 10];
    let n = match rustix::fs::flistxattr(&fd, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        other => other.map_err(io::Error::from)?,
    };
    let mut found = vec![];
    for name in names[..n].split(|b| *b == 0) {
        let kept = name == b"security.capability"
            || name.starts_with(b"user.")
            || name.starts_with(b"system.posix_acl_");
        if !kept {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        match rustix::fs::fgetxattr(&fd, name, &mut value) {
            Ok(n) => {
                value.truncate(n);
                found.push((name.to_vec(), value));
            }
            Err(Errno::NODATA) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
    Ok(found)
}

/// Stores `input` as the file `to`, zeros as holes.
///
/// # Errors
/// Quota when the disk is full; reading fails.
pub fn store(mut input: impl Read, to: &Path) -> Result<()> {
    let mut file = File::create_new(to)?;
    let mut buffer = vec![0u8; 1 << 20];
    let (mut size, mut hole) = (0u64, 0u64);
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        if filled == 0 {
            break;
        }
        for piece in buffer[..filled].chunks(64 << 10) {
            if piece.iter().all(|b| *b == 0) {
                hole += piece.len() as u64;
                continue;
            }
            if hole > 0 {
                file.seek(SeekFrom::Current(hole as i64))?;
                hole = 0;
            }
            file.write_all(piece)?;
        }
        size += filled as u64;
    }
    if size == 0 {
        return Err(Error::invalid("volume", "nothing came"));
    }
    Ok(file.set_len(size)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

    #[test]
    fn tar_reads_what_was_packed() {
        let d = tempfile::tempdir().unwrap();
        let (tree, out) = (d.path().join("tree"), d.path().join("out"));
        let deep = tree.join("a".repeat(90)).join("b".repeat(90));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::create_dir(&out).unwrap();
        std::fs::write(deep.join("file"), vec![7; 100_001]).unwrap();
        std::fs::hard_link(deep.join("file"), tree.join("second")).unwrap();
        symlink("x".repeat(200), tree.join("link")).unwrap();
        std::fs::write(tree.join("empty"), "").unwrap();
        std::fs::set_permissions(tree.join("empty"), PermissionsExt::from_mode(0o4711)).unwrap();
        let big = File::create(tree.join("sparse")).unwrap();
        big.write_at(b"x", 10 << 20).unwrap();
        let mut packed = vec![];
        pack(&tree, &mut packed).unwrap();
        tar::Archive::new(packed.as_slice()).unpack(&out).unwrap();
        for name in ["second", "empty", "sparse"] {
            assert_eq!(std::fs::read(out.join(name)).unwrap(), std::fs::read(tree.join(name)).unwrap());
        }
        let inner = out.join("a".repeat(90)).join("b".repeat(90)).join("file");
        let inode = |p: &Path| std::fs::metadata(p).unwrap().ino();
        assert_eq!(inode(&inner), inode(&out.join("second")));
        assert_eq!(std::fs::read_link(out.join("link")).unwrap().as_os_str().len(), 200);
        let mut again = vec![];
        pack(&tree, &mut again).unwrap();
        assert!(again == packed, "the same tree, the same stream");
    }

    #[test]
    fn zeros_of_a_device_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        let size = 5 * GRAIN + 512;
        file.set_len(size).unwrap();
        assert_eq!(filled(&file, size).unwrap(), []);
        for at in [GRAIN + 7, 3 * GRAIN - 1, size - 1] {
            file.write_all_at(b"x", at).unwrap();
        }
        assert_eq!(filled(&file, size).unwrap(), [(GRAIN, 3 * GRAIN), (5 * GRAIN, size)]);
    }

    #[test]
    fn a_stream_is_stored_with_holes() {
        let d = tempfile::tempdir().unwrap();
        let mut data = vec![0; 8 << 20];
        data[5 << 20] = 1;
        data.extend([2; 77]);
        data.extend([0; 100_000]);
        let at = d.path().join("disk");
        store(data.as_slice(), &at).unwrap();
        assert!(std::fs::read(&at).unwrap() == data);
        assert!(std::fs::metadata(&at).unwrap().blocks() * 512 < 1 << 20);
        assert!(store([].as_slice(), &d.path().join("none")).is_err());
    }
}
