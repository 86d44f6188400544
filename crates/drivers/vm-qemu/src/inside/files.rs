//! Files by Karst's own agent: content flows in both directions with the guest's own speed.

use super::link::{Link, Stream};
use karst_guest::{FileInfo, FileKind, FileWrite, OpenedFile};
use karst_guest_agent::{
    message::{self, Nothing, Opened, Request},
    wire::{MAX_DATA, channel},
};
use karst_model::{Error, Result};
use std::{os::fd::OwnedFd, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::timeout,
};

/// How long one answer may take.
const CALL: Duration = Duration::from_secs(30);
/// Most bytes of a directory's names.
const NAMES: usize = 16 << 20;

fn check(path: &str) -> Result<()> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        return Err(Error::invalid("path", "a path inside a guest is absolute and has no NUL byte"));
    }
    Ok(())
}

fn late() -> Error {
    Error::timeout("the guest's agent did not answer about a file in time")
}

/// Names the path in an error of the guest.
fn about(path: &str) -> impl Fn(Error) -> Error {
    move |mut e| {
        e.message = format!("{path:?}: {}", e.message);
        e
    }
}

/// Opens for reading.
///
/// # Errors
/// Not found; unsupported for devices and the like; unavailable without an agent.
pub(crate) async fn open(link: &Arc<Link>, path: &str) -> Result<OpenedFile> {
    check(path)?;
    let stream = link.open(Request::Open(message::Path { path: path.to_owned() })).await?;
    let opened: Opened = timeout(CALL, stream.reply()).await.map_err(|_| late())?.map_err(about(path))?;
    let kind = match opened.mode & 0o170_000 {
        0o100_000 => FileKind::File,
        0o040_000 => FileKind::Directory,
        0o120_000 => FileKind::Symlink,
        _ => return Err(Error::unsupported(format!("{path:?} is neither a file, a directory nor a link"))),
    };
    let info = FileInfo {
        kind,
        uid: opened.uid,
        gid: opened.gid,
        mode: opened.mode & 0o7777,
        size: opened.size,
        modified: opened.modified,
    };
    let mut file = OpenedFile { info, content: None, entries: vec![], target: None };
    match kind {
        FileKind::Symlink => file.target = Some(String::from_utf8_lossy(&opened.target.0).into_owned()),
        FileKind::Directory => {
            file.entries = timeout(CALL, names(&stream, path)).await.map_err(|_| late())??;
        }
        FileKind::File => file.content = Some(content(stream, path.to_owned())?),
    }
    Ok(file)
}

async fn names(stream: &Stream, path: &str) -> Result<Vec<String>> {
    let mut all = vec![];
    while let Some(bytes) = stream.output(channel::OUT).await {
        stream.taken(channel::OUT, bytes.len());
        all.extend(bytes);
        if all.len() > NAMES {
            return Err(Error::too_large(format!("{path:?} has too many entries to list")));
        }
    }
    stream.end().await.map_err(about(path))?;
    let mut names: Vec<String> = all
        .split(|b| *b == 0)
        .map(|n| String::from_utf8_lossy(n).into_owned())
        // A name out of a hostile guest may become a path at the client.
        .filter(|n| !n.is_empty() && !n.contains('/') && n != "." && n != "..")
        .collect();
    names.sort();
    Ok(names)
}

/// The read end of a pipe that the content flows through.
fn content(stream: Arc<Stream>, path: String) -> Result<OwnedFd> {
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
    rustix::io::ioctl_fionbio(&write, true).map_err(std::io::Error::from)?;
    let mut write = pipe::Sender::from_owned_fd(write)?;
    tokio::spawn(async move {
        while let Some(bytes) = stream.output(channel::OUT).await {
            // The reader left: nothing more to do.
            if write.write_all(&bytes).await.is_err() {
                return;
            }
            stream.taken(channel::OUT, bytes.len());
        }
        if stream.was_cut(channel::OUT) {
            tracing::warn!(
                guest = stream.name(),
                path,
                "a file of a guest was not read to its end: the connection was lost"
            );
        } else if let Err(e) = stream.end().await {
            tracing::warn!(guest = stream.name(), path, error = %e, "a file of a guest was not read to its end");
        }
    });
    Ok(read)
}

/// Writes.
///
/// # Errors
/// Not found when the parent directory does not exist; conflict when a link's name is taken; unavailable without an agent.
pub(crate) async fn write(link: &Arc<Link>, request: FileWrite, source: Option<OwnedFd>) -> Result<()> {
    let path = request.path;
    check(&path)?;
    let what = match request.kind {
        FileKind::File => 0,
        FileKind::Directory => 1,
        FileKind::Symlink => 2,
    };
    let target = request.target.unwrap_or_default();
    if what == 2 && (target.is_empty() || target.contains('\0')) {
        return Err(Error::invalid("target", "a symbolic link needs a target"));
    }
    let stream = link
        .open(Request::Write(message::Write {
            path: path.clone(),
            what,
            uid: request.uid,
            gid: request.gid,
            mode: request.mode,
            append: request.append,
            target,
        }))
        .await?;
    timeout(CALL, stream.reply::<Nothing>()).await.map_err(|_| late())?.map_err(about(&path))?;
    if what == 0 {
        if let Some(source) = source {
            fill(&stream, source).await?;
        }
        stream.end_input().await;
    }
    timeout(CALL, stream.end()).await.map_err(|_| late())?.map_err(about(&path))?;
    Ok(())
}

async fn fill(stream: &Stream, source: OwnedFd) -> Result<()> {
    let mut source = crate::exec::source(source)?;
    let mut buffer = vec![0; MAX_DATA];
    while let Some(room) = stream.credit().await {
        let room = room.min(buffer.len());
        let read = tokio::select! {
            n = source.read(&mut buffer[..room]) => n?,
            // It takes no more, whatever the client still sends, or does not; the end says why.
            () = stream.input_over() => break,
        };
        match read {
            0 => break,
            n => stream.send(&buffer[..n]).await,
        }
    }
    Ok(())
}

/// Deletes a file or an empty directory.
///
/// # Errors
/// Not found; conflict for a directory that is not empty.
pub(crate) async fn delete(link: &Arc<Link>, path: &str) -> Result<()> {
    check(path)?;
    if path.trim_matches('/').is_empty() {
        return Err(Error::invalid("path", "the root of a guest cannot be deleted"));
    }
    let request = Request::Delete(message::Path { path: path.to_owned() });
    link.call::<Nothing>(request, CALL).await.map(drop).map_err(about(path))
}
