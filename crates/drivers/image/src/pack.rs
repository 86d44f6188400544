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
    os::fd::OwnedFd,
    path::Path,
};

/// Packs the tree `root` into `out`, paths relative to it; entries in the order of their names.
///
/// # Errors
/// The tree cannot be read, or nobody reads `out` any more.
pub fn pack(root: &Path, out: impl Write) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty()).map_err(io::Error::from)?;
    let mut out = io::BufWriter::with_capacity(256 << 10, out);
    let mut packer = Packer { root, out: &mut out, links: HashMap::new(), buffer: vec![0; 256 << 10] };
    packer.tree()?;
    // Two empty blocks end it.
    out.write_all(&[0; 1024])?;
    Ok(out.flush()?)
}

struct Packer<'a, W> {
    root: OwnedFd,
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
            let name = if path.is_empty() { b"./".to_vec() } else { [path.as_slice(), b"/"].concat() };
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
                    self.leaf(&directory, &name, &full, &stat)?;
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

    /// One block of 512 bytes; numbers are mode, uid, gid, size, mtime.
    fn block(&mut self, path: &[u8], kind: u8, numbers: [u64; 5], link: &[u8]) -> Result<()> {
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
        Ok(self.out.write_all(&block)?)
    }
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
