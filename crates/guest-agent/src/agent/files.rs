//! Files, as root of the guest and through whatever links its system has.

use super::{
    Refused, failed, freeze,
    mux::Stream,
    refused,
    replace::{Beside, Wanted},
};
use crate::{
    message::{Bytes, Nothing, Opened, Reply, Write, refusal},
    wire::{MAX_DATA, channel},
};
use std::{
    fs::{File, Metadata, OpenOptions, Permissions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

fn check(path: &str) -> Result<&Path, Refused> {
    if path.starts_with('/') && !path.contains('\0') && path.len() < 4096 {
        Ok(Path::new(path))
    } else {
        Err(refused(refusal::INVALID, "path", "a path is absolute and has no NUL byte"))
    }
}

fn opened(meta: &Metadata, target: Bytes) -> Opened {
    Opened {
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        size: meta.size(),
        modified: meta.mtime(),
        target,
    }
}

/// Describes what is there, then gives its content or names.
pub(super) fn open(stream: &Stream, path: &str) -> Result<(), Refused> {
    let path = check(path)?;
    let meta = std::fs::symlink_metadata(path).map_err(failed)?;
    let kind = meta.file_type();
    if kind.is_symlink() {
        let target = std::fs::read_link(path).map_err(failed)?.as_os_str().as_bytes().to_vec();
        stream.reply(&Reply(Ok(opened(&meta, Bytes(target)))));
    } else if kind.is_dir() {
        let entries = std::fs::read_dir(path).map_err(failed)?;
        stream.reply(&Reply(Ok(opened(&meta, Bytes::default()))));
        let mut names = vec![];
        for entry in entries {
            names.extend(entry.map_err(failed)?.file_name().as_bytes());
            names.push(0);
            if names.len() >= MAX_DATA {
                if !stream.put(channel::OUT, &names) {
                    return Ok(());
                }
                names.clear();
            }
        }
        stream.put(channel::OUT, &names);
    } else {
        // Without waiting for what is no file after all.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let regular = || refused(refusal::UNSUPPORTED, "path", "neither a file, a directory nor a link");
        if !kind.is_file() {
            return Err(regular());
        }
        let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(regular());
        }
        stream.reply(&Reply(Ok(opened(&meta, Bytes::default()))));
        let mut buffer = vec![0; MAX_DATA];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) if stream.put(channel::OUT, &buffer[..n]) => {}
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }
    stream.eof(channel::OUT);
    stream.end(0);
    Ok(())
}

/// Writes what comes, to its end.
pub(super) fn write(stream: &Stream, w: Write) -> Result<(), Refused> {
    let path = check(&w.path)?;
    if freeze::is_frozen() {
        return Err(refused(refusal::BUSY, "", "the file systems of the guest are frozen"));
    }
    match w.what {
        0 if w.append => return file(stream, path, &w),
        0 => return replace(stream, path, &w),
        1 => match std::fs::DirBuilder::new().mode(w.mode.unwrap_or(0o755) & 0o777).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => adjust(path, &w)?,
            Err(e) => return Err(failed(e)),
            Ok(()) => adjust(path, &w)?,
        },
        2 if w.target.is_empty() || w.target.contains('\0') => {
            return Err(refused(refusal::INVALID, "target", "a symbolic link needs a target"));
        }
        2 => {
            std::os::unix::fs::symlink(&w.target, path).map_err(failed)?;
            std::os::unix::fs::lchown(path, w.uid, w.gid).map_err(failed)?;
        }
        _ => return Err(refused(refusal::UNSUPPORTED, "kind", "unknown kind of file")),
    }
    stream.reply(&Reply(Ok(Nothing {})));
    stream.end(0);
    Ok(())
}

fn adjust(path: &Path, w: &Write) -> Result<(), Refused> {
    if w.uid.is_some() || w.gid.is_some() {
        std::os::unix::fs::chown(path, w.uid, w.gid).map_err(failed)?;
    }
    match w.mode {
        Some(mode) => std::fs::set_permissions(path, Permissions::from_mode(mode & 0o7777)).map_err(failed),
        None => Ok(()),
    }
}

/// Makes a file, or gives one another content: whole or not at all, where its file system can.
fn replace(stream: &Stream, path: &Path, w: &Write) -> Result<(), Refused> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let old = match OpenOptions::new().write(true).custom_flags(flags).open(path) {
        Ok(old) => Some(old),
        Err(e) if e.kind() == io::ErrorKind::NotFound && !w.path.ends_with('/') => None,
        Err(e) => return Err(failed(e)),
    };
    if let Some(old) = &old
        && !old.metadata().map_err(failed)?.is_file()
    {
        return Err(refused(refusal::UNSUPPORTED, "path", "not a regular file"));
    }
    let Some(mut beside) = Beside::make(path, old).map_err(failed)? else {
        return file(stream, path, w);
    };
    stream.reply(&Reply(Ok(Nothing {})));
    if !take(stream, |bytes| beside.write(bytes))? {
        return Ok(());
    }
    beside.commit(Wanted { uid: w.uid, gid: w.gid, mode: w.mode }).map_err(failed)?;
    stream.end(0);
    Ok(())
}

/// Hands on what comes, to its end; false when it broke off.
fn take(stream: &Stream, mut write: impl FnMut(&[u8]) -> io::Result<()>) -> Result<bool, Refused> {
    loop {
        if stream.is_closed() {
            return Ok(false);
        }
        match stream.input() {
            Ok(bytes) => {
                write(&bytes).map_err(failed)?;
                stream.used(bytes.len());
            }
            Err(true) => return Ok(true),
            Err(false) => stream.wait(),
        }
    }
}

fn file(stream: &Stream, path: &Path, w: &Write) -> Result<(), Refused> {
    let open = |create: bool| {
        let mut options = OpenOptions::new();
        options.write(true).append(w.append).truncate(!w.append);
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        if create {
            // Nobody else reads it before its owner and mode are what they shall be.
            options.create_new(true).truncate(false).mode(if w.mode.is_some() { 0o600 } else { 0o644 });
        }
        options.open(path)
    };
    let file = match open(false) {
        // A link that leads nowhere: made where it leads, as a shell does.
        Err(e) if e.kind() == io::ErrorKind::NotFound => open(true).or_else(|e| match e.raw_os_error() {
            Some(libc::EEXIST) => File::create(path),
            _ => Err(e),
        }),
        other => other,
    }
    .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(refused(refusal::UNSUPPORTED, "path", "not a regular file"));
    }
    if w.uid.is_some() || w.gid.is_some() {
        std::os::unix::fs::fchown(&file, w.uid, w.gid).map_err(failed)?;
    }
    stream.reply(&Reply(Ok(Nothing {})));
    if !take(stream, |bytes| io::Write::write_all(&mut &file, bytes))? {
        return Ok(());
    }
    // At last: writing takes the set-user-id bits away.
    if let Some(mode) = w.mode {
        file.set_permissions(Permissions::from_mode(mode & 0o7777)).map_err(failed)?;
    }
    stream.end(0);
    Ok(())
}

/// Deletes a file or an empty directory.
pub(super) fn delete(path: &str) -> Result<Nothing, Refused> {
    let path = check(path)?;
    if path.parent().is_none() {
        return Err(refused(refusal::INVALID, "path", "the root cannot be deleted"));
    }
    if freeze::is_frozen() {
        return Err(refused(refusal::BUSY, "", "the file systems of the guest are frozen"));
    }
    let meta = std::fs::symlink_metadata(path).map_err(failed)?;
    if meta.is_dir() { std::fs::remove_dir(path) } else { std::fs::remove_file(path) }.map_err(failed)?;
    Ok(Nothing {})
}
