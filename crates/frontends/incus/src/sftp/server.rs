//! The server's side of an SFTP session.

use super::packet::{self, Answer, Attributes, Fields, Malformed, answer, open, request, status};
use async_trait::async_trait;
use karst_model::{
    Error, Result,
    guest::{FileInfo, FileKind, FileWrite},
};
use std::{collections::HashMap, io, pin::Pin};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest packet taken, in bytes; clients send at most 32 KiB of data in one.
const LARGEST: usize = 256 << 10;
/// Open handles of a session.
const HANDLES: usize = 256;
/// Most data in one answer.
const CHUNK: usize = 64 << 10;
/// Entries in one answer to READDIR.
const ENTRIES: usize = 64;
/// Symbolic links followed.
const LINKS: u32 = 16;

/// A file being read.
pub type Reader = Pin<Box<dyn AsyncRead + Send + Sync>>;

/// A file being written.
#[async_trait]
pub trait Write: Send + Sync {
    /// Takes more of it.
    async fn write(&mut self, data: &[u8]) -> Result<()>;
    /// Ends it: it is whole on return. One that is dropped instead is given up: what was there before stays.
    async fn finish(self: Box<Self>) -> Result<()>;
}
/// A file being written.
pub type Writer = Box<dyn Write>;

/// What was found at a path; links are not followed.
pub struct Opened {
    /// What is known of it.
    pub info: FileInfo,
    /// Entries of a directory.
    pub entries: Vec<String>,
    /// Target of a symbolic link.
    pub target: Option<String>,
    /// Content of a regular file.
    pub content: Option<Reader>,
}

/// The files of one guest.
#[async_trait]
pub trait Files: Send + Sync {
    /// Opens.
    async fn open(&self, path: &str) -> Result<Opened>;
    /// Writes; a regular file is written by the answer, other kinds are made at once.
    async fn write(&self, write: FileWrite) -> Result<Option<Writer>>;
    /// Deletes a file or empty directory.
    async fn delete(&self, path: &str) -> Result<()>;
}

enum Handle {
    Read { path: String, info: FileInfo, content: Reader, at: u64 },
    Write { path: String, state: Writing, at: u64 },
    Directory { path: String, info: FileInfo, entries: std::vec::IntoIter<String> },
}

/// How far the writing of a file is.
enum Writing {
    /// Bytes go here.
    Open(Writer),
    /// What was written so far is whole; more is appended.
    Settled,
}

struct Session<'a> {
    files: &'a dyn Files,
    handles: HashMap<u32, Handle>,
    next: u32,
}

/// Serves a session until the client leaves.
///
/// # Errors
/// When the connection breaks or the client sends nonsense.
pub async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, files: &dyn Files) -> io::Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = tokio::io::BufReader::with_capacity(64 << 10, reader);
    let mut session = Session { files, handles: HashMap::new(), next: 0 };
    let mut buffer = vec![];
    loop {
        let n = match reader.read_u32().await {
            Ok(n) => n as usize,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(e) => return Err(e),
        };
        if n == 0 || n > LARGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet of an impossible size"));
        }
        buffer.resize(n, 0);
        reader.read_exact(&mut buffer).await?;
        if buffer[0] == request::INIT {
            writer.write_all(&Answer::version()).await?;
            continue;
        }
        let mut fields = Fields(&buffer[1..]);
        let id =
            fields.u32().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a packet without an id"))?;
        let reply = match session.handle(buffer[0], id, fields).await {
            Ok(reply) => reply,
            Err(Failure::Malformed) => packet::status(id, status::BAD_MESSAGE, "the request is malformed"),
            Err(Failure::Error(e)) => packet::status_of(id, &e),
        };
        writer.write_all(&reply).await?;
    }
    // A client that is killed leaves between two packets too, so only closing says that a file is whole. What was not closed
    // is given up with the session, and the file that it was to replace stays.
    Ok(())
}

enum Failure {
    Malformed,
    Error(Error),
}
impl From<Malformed> for Failure {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}
impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Error(e)
    }
}
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Error(e.into())
    }
}

/// An absolute path without `.`, `..` and doubled slashes; what climbs above the root stays there.
pub fn absolute(path: &str) -> String {
    let mut parts = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn join(directory: &str, name: &str) -> String {
    if name.starts_with('/') { absolute(name) } else { absolute(&format!("{directory}/{name}")) }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("/", |(p, _)| p)
}

fn ok(id: u32) -> Vec<u8> {
    packet::status(id, status::OK, "")
}

impl Session<'_> {
    async fn handle(
        &mut self,
        kind: u8,
        id: u32,
        mut f: Fields<'_>,
    ) -> std::result::Result<Vec<u8>, Failure> {
        match kind {
            request::OPEN => {
                let path = absolute(&f.path()?);
                let flags = f.u32()?;
                let attributes = f.attributes()?;
                self.open(id, path, flags, attributes).await
            }
            request::CLOSE => {
                let handle = handle_of(f.string()?)?;
                match self.handles.remove(&handle) {
                    Some(Handle::Write { state: Writing::Open(writer), .. }) => {
                        writer.finish().await?;
                        Ok(ok(id))
                    }
                    Some(_) => Ok(ok(id)),
                    None => Err(no_handle()),
                }
            }
            request::READ => {
                let handle = handle_of(f.string()?)?;
                let (offset, wanted) = (f.u64()?, f.u32()? as usize);
                self.read(id, handle, offset, wanted.min(CHUNK)).await
            }
            request::WRITE => {
                let handle = handle_of(f.string()?)?;
                let offset = f.u64()?;
                let data = f.string()?;
                self.write(handle, offset, data).await?;
                Ok(ok(id))
            }
            request::LSTAT => {
                let path = absolute(&f.path()?);
                self.settle(&path).await?;
                let found = self.files.open(&path).await?;
                Ok(attributes(id, &found.info))
            }
            request::STAT => {
                let path = absolute(&f.path()?);
                self.settle(&path).await?;
                let (_, found) = self.follow(path).await?;
                Ok(attributes(id, &found.info))
            }
            request::FSTAT => {
                let handle = handle_of(f.string()?)?;
                let path = match self.handles.get(&handle) {
                    Some(Handle::Read { info, .. } | Handle::Directory { info, .. }) => {
                        return Ok(attributes(id, info));
                    }
                    Some(Handle::Write { path, .. }) => path.clone(),
                    None => return Err(no_handle()),
                };
                self.settle(&path).await?;
                Ok(attributes(id, &self.files.open(&path).await?.info))
            }
            request::SETSTAT => {
                let path = absolute(&f.path()?);
                let wanted = f.attributes()?;
                self.set(&path, wanted).await?;
                Ok(ok(id))
            }
            request::FSETSTAT => {
                let handle = handle_of(f.string()?)?;
                let wanted = f.attributes()?;
                let path = match self.handles.get(&handle) {
                    Some(
                        Handle::Read { path, .. }
                        | Handle::Write { path, .. }
                        | Handle::Directory { path, .. },
                    ) => path.clone(),
                    None => return Err(no_handle()),
                };
                self.set(&path, wanted).await?;
                Ok(ok(id))
            }
            request::OPENDIR => {
                let path = absolute(&f.path()?);
                let (path, found) = self.follow(path).await?;
                if found.info.kind != FileKind::Directory {
                    return Err(Error::invalid("path", format!("{path:?} is not a directory")).into());
                }
                self.give(
                    id,
                    Handle::Directory { path, info: found.info, entries: found.entries.into_iter() },
                )
            }
            request::READDIR => {
                let handle = handle_of(f.string()?)?;
                self.list(id, handle).await
            }
            request::REMOVE | request::RMDIR => {
                let path = absolute(&f.path()?);
                let found = self.files.open(&path).await?;
                if (found.info.kind == FileKind::Directory) != (kind == request::RMDIR) {
                    let text = if kind == request::RMDIR { "is not a directory" } else { "is a directory" };
                    return Err(Error::conflict(format!("{path:?} {text}")).into());
                }
                self.files.delete(&path).await?;
                Ok(ok(id))
            }
            request::MKDIR => {
                let path = absolute(&f.path()?);
                let wanted = f.attributes()?;
                if self.files.open(&path).await.is_ok() {
                    return Err(Error::conflict(format!("{path:?} exists")).into());
                }
                let write =
                    FileWrite { mode: wanted.mode.or(Some(0o755)), ..plain(&path, FileKind::Directory) };
                self.files.write(owned(write, wanted)).await?;
                Ok(ok(id))
            }
            request::REALPATH => {
                let path = absolute(&f.path()?);
                let mut a = Answer::new(answer::NAME, id);
                a.u32(1);
                a.string(path.as_bytes());
                a.string(path.as_bytes());
                a.u32(0);
                Ok(a.finish())
            }
            request::READLINK => {
                let path = absolute(&f.path()?);
                let found = self.files.open(&path).await?;
                let Some(target) = found.target else {
                    return Err(Error::invalid("path", format!("{path:?} is not a symbolic link")).into());
                };
                let mut a = Answer::new(answer::NAME, id);
                a.u32(1);
                a.string(target.as_bytes());
                a.string(target.as_bytes());
                a.u32(0);
                Ok(a.finish())
            }
            request::SYMLINK => {
                // OpenSSH, and every client after it, sends the target first, unlike the draft.
                let target = f.path()?;
                let path = absolute(&f.path()?);
                if self.files.open(&path).await.is_ok() {
                    return Err(Error::conflict(format!("{path:?} exists")).into());
                }
                self.files
                    .write(FileWrite { target: Some(target), ..plain(&path, FileKind::Symlink) })
                    .await?;
                Ok(ok(id))
            }
            _ => Ok(packet::status(id, status::OP_UNSUPPORTED, "this request is not supported")),
        }
    }

    fn give(&mut self, id: u32, handle: Handle) -> std::result::Result<Vec<u8>, Failure> {
        if self.handles.len() >= HANDLES {
            return Err(Error::quota(format!("more than {HANDLES} open handles")).into());
        }
        self.next = self.next.wrapping_add(1);
        self.handles.insert(self.next, handle);
        let mut a = Answer::new(answer::HANDLE, id);
        a.string(self.next.to_string().as_bytes());
        Ok(a.finish())
    }

    /// The file behind a path, through symbolic links.
    async fn follow(&self, mut path: String) -> Result<(String, Opened)> {
        for _ in 0..LINKS {
            let found = self.files.open(&path).await?;
            match &found.target {
                Some(target) if found.info.kind == FileKind::Symlink => path = join(parent(&path), target),
                _ => return Ok((path, found)),
            }
        }
        Err(Error::invalid("path", format!("{path:?}: too many symbolic links")))
    }

    async fn open(
        &mut self,
        id: u32,
        path: String,
        flags: u32,
        wanted: Attributes,
    ) -> std::result::Result<Vec<u8>, Failure> {
        if flags & open::WRITE == 0 {
            let (path, found) = self.follow(path).await?;
            return match found.content {
                Some(content) => self.give(id, Handle::Read { path, info: found.info, content, at: 0 }),
                // As the system call does it: clients open first and look what it is then.
                None if found.info.kind == FileKind::Directory => self.give(
                    id,
                    Handle::Directory { path, info: found.info, entries: found.entries.into_iter() },
                ),
                None => Err(Error::invalid("path", format!("{path:?} is not a regular file")).into()),
            };
        }
        let (path, existing) = match self.follow(path.clone()).await {
            Ok((path, found)) => (path, Some(found.info)),
            Err(e) if e.is(karst_model::ErrorKind::NotFound) => (path, None),
            Err(e) => return Err(e.into()),
        };
        match &existing {
            Some(_) if flags & open::EXCL != 0 => {
                return Err(Error::conflict(format!("{path:?} exists")).into());
            }
            Some(info) if info.kind != FileKind::File => {
                return Err(Error::invalid("path", format!("{path:?} is not a regular file")).into());
            }
            None if flags & open::CREAT == 0 => {
                return Err(Error::not_found(format!("{path:?} does not exist")).into());
            }
            _ => {}
        }
        // Without TRUNC an existing file keeps its content; then writing can only go on at its end.
        let append = existing.is_some() && flags & open::TRUNC == 0;
        if append && flags & open::APPEND == 0 && existing.as_ref().is_some_and(|i| i.size > 0) {
            return Err(Error::unsupported(
                "a file is either rewritten or appended to, not changed in its middle",
            )
            .into());
        }
        let write = FileWrite {
            append,
            mode: if existing.is_none() { wanted.mode } else { None },
            ..plain(&path, FileKind::File)
        };
        let writer = self.files.write(owned(write, wanted)).await?;
        let Some(writer) = writer else {
            return Err(
                Error::internal("the file could not be written", "no stream for a regular file").into()
            );
        };
        let at = if append { existing.map_or(0, |i| i.size) } else { 0 };
        self.give(id, Handle::Write { path, state: Writing::Open(writer), at })
    }

    async fn read(
        &mut self,
        id: u32,
        handle: u32,
        offset: u64,
        wanted: usize,
    ) -> std::result::Result<Vec<u8>, Failure> {
        let Some(Handle::Read { content, at, path, .. }) = self.handles.get_mut(&handle) else {
            return Err(no_handle());
        };
        if offset > *at {
            // Clients read ahead beyond a short answer; what lies between is skipped up to the end.
            let mut skipped = content.take(offset - *at);
            *at += tokio::io::copy(&mut skipped, &mut tokio::io::sink()).await?;
            if *at < offset {
                return Ok(packet::status(id, status::EOF, "EOF"));
            }
        } else if offset < *at {
            // A second reading from the start (a client that retries): open it again and go there.
            let Some(mut again) = self.files.open(path).await?.content else {
                return Err(Error::conflict(format!("{path:?} is no longer a regular file")).into());
            };
            let mut skipped = (&mut again).take(offset);
            *at = tokio::io::copy(&mut skipped, &mut tokio::io::sink()).await?;
            *content = again;
        }
        let mut data = vec![0; wanted];
        let mut n = 0;
        // Short answers make clients ask again for the rest, so fill it.
        while n < wanted {
            match content.read(&mut data[n..]).await? {
                0 => break,
                m => n += m,
            }
        }
        *at += n as u64;
        if n == 0 {
            return Ok(packet::status(id, status::EOF, "EOF"));
        }
        let mut a = Answer::new(answer::DATA, id);
        a.string(&data[..n]);
        Ok(a.finish())
    }

    async fn write(&mut self, handle: u32, offset: u64, data: &[u8]) -> std::result::Result<(), Failure> {
        let files = self.files;
        let Some(Handle::Write { path, state, at }) = self.handles.get_mut(&handle) else {
            return Err(no_handle());
        };
        if offset != *at {
            return Err(
                Error::unsupported(format!("{path:?}: writing at {offset}, where {at} is next")).into()
            );
        }
        if matches!(state, Writing::Settled) {
            let write = FileWrite { append: true, ..plain(path, FileKind::File) };
            let Some(writer) = files.write(write).await? else {
                return Err(Error::conflict(format!("{path:?} is no longer a regular file")).into());
            };
            *state = Writing::Open(writer);
        }
        if let Writing::Open(writer) = state {
            writer.write(data).await?;
        }
        *at += data.len() as u64;
        Ok(())
    }

    /// Makes what was written to `path` so far whole, so that it can be looked at or changed by its path.
    async fn settle(&mut self, wanted: &str) -> Result<()> {
        for handle in self.handles.values_mut() {
            if let Handle::Write { path, state, .. } = handle
                && path == wanted
                && let Writing::Open(writer) = std::mem::replace(state, Writing::Settled)
            {
                writer.finish().await?;
            }
        }
        Ok(())
    }

    async fn set(&mut self, path: &str, wanted: Attributes) -> std::result::Result<(), Failure> {
        self.settle(path).await?;
        let (path, found) = self.follow(path.to_owned()).await?;
        if let Some(size) = wanted.size {
            if size != 0 || found.info.kind != FileKind::File {
                return Err(Error::unsupported("a file can be truncated to nothing only").into());
            }
            if let Some(writer) = self.files.write(plain(&path, FileKind::File)).await? {
                writer.finish().await?;
            }
        }
        if wanted.owner.is_none() && wanted.mode.is_none() {
            // Times alone: nothing can be set, nothing depends on it.
            return Ok(());
        }
        // Appending nothing sets owner and mode and touches nothing else.
        let write = FileWrite { append: true, mode: wanted.mode, ..plain(&path, found.info.kind) };
        if let Some(writer) = self.files.write(owned(write, wanted)).await? {
            writer.finish().await?;
        }
        Ok(())
    }

    async fn list(&mut self, id: u32, handle: u32) -> std::result::Result<Vec<u8>, Failure> {
        let files = self.files;
        let Some(Handle::Directory { path, entries, .. }) = self.handles.get_mut(&handle) else {
            return Err(no_handle());
        };
        let mut found = vec![];
        while found.len() < ENTRIES {
            let Some(name) = entries.next() else { break };
            // What vanished since is left out.
            if let Ok(opened) = files.open(&join(path, &name)).await {
                found.push((name, opened.info));
            }
        }
        if found.is_empty() {
            return Ok(packet::status(id, status::EOF, "EOF"));
        }
        let mut a = Answer::new(answer::NAME, id);
        a.u32(found.len() as u32);
        for (name, info) in &found {
            a.string(name.as_bytes());
            a.string(format!("{:o} {} {} {} {name}", info.mode, info.uid, info.gid, info.size).as_bytes());
            a.attributes(info);
        }
        Ok(a.finish())
    }
}

fn plain(path: &str, kind: FileKind) -> FileWrite {
    FileWrite { path: path.to_owned(), kind, uid: None, gid: None, mode: None, append: false, target: None }
}

fn owned(write: FileWrite, wanted: Attributes) -> FileWrite {
    FileWrite { uid: wanted.owner.map(|o| o.0), gid: wanted.owner.map(|o| o.1), ..write }
}

fn attributes(id: u32, info: &FileInfo) -> Vec<u8> {
    let mut a = Answer::new(answer::ATTRS, id);
    a.attributes(info);
    a.finish()
}

fn handle_of(s: &[u8]) -> std::result::Result<u32, Failure> {
    std::str::from_utf8(s).ok().and_then(|s| s.parse().ok()).ok_or_else(no_handle)
}

fn no_handle() -> Failure {
    Failure::Error(Error::invalid("handle", "the handle is not open"))
}
