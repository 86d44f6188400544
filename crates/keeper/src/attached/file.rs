//! Files of a container, reached by descriptors only; a path never leaves its root.

use super::{
    At, Failure, Outcome, Root,
    replace::{Beside, Wanted},
};
use crate::sys;
use karst_keeper::{
    attach::{Operation, Request},
    protocol as p,
};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, MemfdFlags, Mode, OFlags, RawDir, ResolveFlags, Stat, Uid, fchmod, fchown,
        fstat, memfd_create, mkdirat, openat2, readlinkat, statat, symlinkat, unlinkat,
    },
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
};

/// Most entries of a directory that are listed.
const MAX_ENTRIES: usize = 200_000;

/// Does it and replies.
pub(super) fn run(r: &Request, root: Root, content: Option<OwnedFd>, launch: BorrowedFd) -> Outcome<()> {
    let ok = |body: &[u8], fd: Option<BorrowedFd>| {
        sys::send(launch, &[p::VERSION, p::code::OK], body, fd);
    };
    match r.operation {
        Operation::Exec | Operation::Mount => return Err(Failure::new("no file operation", libc::EINVAL)),
        Operation::Open => return open(r, &root, ok),
        Operation::WriteFile => write_file(r, &root, content, launch)?,
        Operation::WriteDirectory => write_directory(r, &root)?,
        Operation::WriteSymlink => write_symlink(r, &root)?,
        Operation::Delete => delete(r, &root)?,
        Operation::Unmount => super::mount::unmount(r, &root)?,
    }
    ok(&[], None);
    Ok(())
}

impl Root {
    /// Opens beneath the root; `..` and links end at it, links of `/proc` that jump are refused.
    pub(super) fn open(&self, path: &OsStr, flags: OFlags, mode: u32) -> rustix::io::Result<OwnedFd> {
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if !self.inside {
            // A stopped container's directory has nothing mounted in it.
            resolve |= ResolveFlags::NO_XDEV;
        }
        // EAGAIN: something was renamed meanwhile, and the kernel cannot tell whether the path stayed inside.
        let mut result = Err(Errno::AGAIN);
        for _ in 0..64 {
            result = openat2(&self.dir, path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode), resolve);
            if !matches!(result, Err(Errno::AGAIN | Errno::INTR)) {
                break;
            }
        }
        result
    }

    /// The directory that holds the last part of `path`, and that part.
    pub(super) fn parent(&self, path: &OsStr) -> Outcome<(OwnedFd, OsString)> {
        let bytes = path.as_bytes();
        let end = bytes.iter().rposition(|b| *b != b'/').map_or(0, |i| i + 1);
        let at = bytes[..end].iter().rposition(|b| *b == b'/').map_or(0, |i| i + 1);
        let name = &bytes[at..end];
        if matches!(name, b"" | b"." | b"..") {
            return Err(Failure::new("the path names no entry of a directory", libc::EINVAL));
        }
        let dir = if at == 0 { b"/".as_slice() } else { &bytes[..at] };
        let dir = self
            .open(OsStr::from_bytes(dir), OFlags::PATH | OFlags::DIRECTORY, 0)
            .map_err(|e| Failure { what: format!("{:?}", OsStr::from_bytes(dir)).into(), error: e.into() })?;
        Ok((dir, OsString::from_vec(name.to_vec())))
    }
}

fn describe(kind: &str, s: &Stat) -> Vec<u8> {
    format!("{kind} {} {} {} {} {}", s.st_uid, s.st_gid, s.st_mode & 0o7777, s.st_size, s.st_mtime)
        .into_bytes()
}

fn open(r: &Request, root: &Root, ok: impl Fn(&[u8], Option<BorrowedFd>)) -> Outcome<()> {
    // First without opening it: what looks at a device or a FIFO must not act on it.
    let entry = root
        .open(&r.path, OFlags::PATH | OFlags::NOFOLLOW, 0)
        .map_err(|e| Failure { what: format!("{:?}", r.path).into(), error: e.into() })?;
    let stat = fstat(&entry).at("opening")?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => {
            let target = readlinkat(&entry, "", vec![]).at("reading the link")?;
            let mut body = describe("symlink", &stat);
            body.push(b'\n');
            body.extend_from_slice(target.as_bytes());
            ok(&body, None);
        }
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let dir = root.open(&r.path, flags, 0).at("opening the directory")?;
            let mut list = File::from(memfd_create("entries", MemfdFlags::CLOEXEC).at("listing")?);
            for name in entries(&dir)? {
                list.write_all(&name).and_then(|()| list.write_all(&[0])).at("listing")?;
            }
            ok(&describe("directory", &stat), Some(list.as_fd()));
        }
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
            let file = root.open(&r.path, flags, 0).at("opening")?;
            let stat = fstat(&file).at("opening")?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(Failure::new("it was replaced meanwhile", libc::EAGAIN));
            }
            let body = describe("file", &stat);
            if fstat(&root.dir).is_ok_and(|top| top.st_dev == stat.st_dev) {
                ok(&body, Some(file.as_fd()));
                return Ok(());
            }
            // Of another file system, which the container may itself provide (FUSE) or which is the kernel's: reading it
            // may block or act, so it is this process that reads.
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).at("opening")?;
            ok(&body, Some(read.as_fd()));
            drop(read);
            let _ = copy(File::from(file), &mut File::from(write));
        }
        _ => {
            return Err(Failure::new("it is neither file, directory nor link", libc::EOPNOTSUPP));
        }
    }
    Ok(())
}

fn entries(dir: &OwnedFd) -> Outcome<Vec<Vec<u8>>> {
    let mut names = vec![];
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut reader = RawDir::new(dir, &mut buffer);
    while let Some(entry) = reader.next() {
        let entry = entry.at("listing")?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(name.to_vec());
        }
        if names.len() > MAX_ENTRIES {
            return Err(Failure::new("the directory has too many entries", libc::E2BIG));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Copies to the end; by hand, because `io::copy` would carry a large buffer's machinery in.
pub(super) fn copy(mut from: File, to: &mut File) -> io::Result<()> {
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Owner and mode: as asked, else for a new entry root and the default, else unchanged.
fn finish(r: &Request, fd: &OwnedFd, new: bool, default: u32) -> Outcome<()> {
    let (uid, gid) = (r.uid.or(new.then_some(0)), r.gid.or(new.then_some(0)));
    if uid.is_some() || gid.is_some() {
        fchown(fd, uid.map(Uid::from_raw), gid.map(Gid::from_raw)).at("setting the owner")?;
    }
    // After the owner, whose change clears set-user-id.
    if let Some(mode) = r.mode.or(new.then_some(default)) {
        fchmod(fd, Mode::from_raw_mode(mode & 0o7777)).at("setting the permissions")?;
    }
    Ok(())
}

/// Makes a file, or gives one another content: whole or not at all, where its file system can.
fn write_file(r: &Request, root: &Root, content: Option<OwnedFd>, launch: BorrowedFd) -> Outcome<()> {
    if r.append {
        return write_in_place(r, root, content);
    }
    let old = match root.open(&r.path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY, 0) {
        Ok(old) => Some(old),
        Err(Errno::NOENT) if !r.path.as_bytes().ends_with(b"/") => None,
        Err(e) => return Err(e).at("opening"),
    };
    if let Some(old) = &old
        && FileType::from_raw_mode(fstat(old).at("opening")?.st_mode) != FileType::RegularFile
    {
        return Err(Failure::new("it is no regular file", libc::EOPNOTSUPP));
    }
    let Ok(mut beside) = Beside::make(root, &r.path, old)? else {
        return write_in_place(r, root, content);
    };
    if let Some(content) = content {
        beside.fill(File::from(content))?;
    }
    beside.commit(&Wanted { uid: r.uid, gid: r.gid, mode: r.mode }, 0o644, launch)
}

fn write_in_place(r: &Request, root: &Root, content: Option<OwnedFd>) -> Outcome<()> {
    let base = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let append = if r.append { OFlags::APPEND } else { OFlags::empty() };
    let create = base | append | OFlags::CREATE | OFlags::EXCL;
    let (file, new) = match root.open(&r.path, create, 0o600) {
        Ok(file) => (file, true),
        Err(Errno::EXIST) => match root.open(&r.path, base | append, 0) {
            Ok(file) => (file, false),
            // A link to nothing yet.
            Err(Errno::NOENT) => {
                (root.open(&r.path, base | append | OFlags::CREATE, 0o600).at("opening")?, true)
            }
            Err(e) => return Err(e).at("opening"),
        },
        Err(e) => return Err(e).at("opening"),
    };
    if FileType::from_raw_mode(fstat(&file).at("opening")?.st_mode) != FileType::RegularFile {
        return Err(Failure::new("it is no regular file", libc::EOPNOTSUPP));
    }
    if !r.append {
        rustix::fs::ftruncate(&file, 0).at("emptying the file")?;
    }
    if let Some(content) = content {
        let file = file.try_clone().at("writing")?;
        copy(File::from(content), &mut File::from(file)).at("writing")?;
    }
    finish(r, &file, new, 0o644)
}

fn write_directory(r: &Request, root: &Root) -> Outcome<()> {
    let open = OFlags::RDONLY | OFlags::DIRECTORY;
    if let Ok(dir) = root.open(&r.path, open, 0) {
        return finish(r, &dir, false, 0o755);
    }
    let (parent, name) = root.parent(&r.path)?;
    let new = match mkdirat(&parent, name.as_os_str(), Mode::from_raw_mode(0o700)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(e) => return Err(e).at("making the directory"),
    };
    let flags = open | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir =
        rustix::fs::openat(&parent, name.as_os_str(), flags, Mode::empty()).at("making the directory")?;
    finish(r, &dir, new, 0o755)
}

fn write_symlink(r: &Request, root: &Root) -> Outcome<()> {
    let (parent, name) = root.parent(&r.path)?;
    match symlinkat(r.target.as_os_str(), &parent, name.as_os_str()) {
        Err(Errno::EXIST)
            if readlinkat(&parent, name.as_os_str(), vec![])
                .is_ok_and(|t| t.as_bytes() == r.target.as_bytes()) => {}
        other => other.at("making the link")?,
    }
    let owner = (r.uid.map(Uid::from_raw), r.gid.map(Gid::from_raw));
    if owner != (None, None) {
        rustix::fs::chownat(&parent, name.as_os_str(), owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .at("setting the owner")?;
    }
    Ok(())
}

fn delete(r: &Request, root: &Root) -> Outcome<()> {
    let (parent, name) = root.parent(&r.path)?;
    let stat = statat(&parent, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW).at("deleting")?;
    let flags = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => AtFlags::REMOVEDIR,
        _ => AtFlags::empty(),
    };
    unlinkat(&parent, name.as_os_str(), flags).at("deleting")
}
