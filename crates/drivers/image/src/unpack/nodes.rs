//! Entries of an archive as files, directories and links below the destination, with their owners, modes and times.

use super::{Part, Unpacker, show, times};
use karst_model::{Error, Result};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, XattrFlags},
    io::Errno,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::AsFd,
};

impl Unpacker<'_> {
    pub(super) fn node<R: Read>(
        &mut self,
        mut entry: tar::Entry<'_, R>,
        path: &[u8],
        part: Part,
    ) -> Result<()> {
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

    pub(super) fn attributes<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<Attributes> {
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
    pub(super) fn own(&self, fd: impl AsFd, a: &Attributes, mode: u32, path: &[u8]) -> Result<()> {
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
}

/// Owner, time and extended attributes of an entry.
pub(super) struct Attributes {
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
