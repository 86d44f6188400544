//! Files between this side and the server, as streams: never whole in memory, and a file appears here when it is whole.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use hyper::{
    HeaderMap, Method,
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue},
};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use crate::{
    client::{
        Answer, Url, empty,
        files::body_chunks,
        transport::{CHUNK, streamed},
    },
    context::{Context, at, interruptible},
    error::{Error, Result},
    output::stdout_error,
    terminal,
};

/// What stands for standard input and output.
const STANDARD: &str = "-";

/// Where a file is written.
#[derive(Debug)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// A file that is there under its name when it is whole.
    File {
        /// Its name.
        path: PathBuf,
        /// What is written until then; gone when it is dropped.
        temporary: tempfile::NamedTempFile,
    },
}

impl Target {
    /// What the user names: a file, a directory for `default`, or `-`. It is opened here, so that a place that cannot be
    /// written to is known before the server does any work.
    pub fn of(named: Option<&Path>, default: &str) -> Result<Self> {
        match named {
            Some(path) if path == Path::new(STANDARD) => {
                if io::stdout().is_terminal() {
                    let text =
                        format!("{default} is not for a terminal: name a file, or redirect standard output");
                    return Err(Error::Usage(text));
                }
                Ok(Self::Stdout)
            }
            Some(path) if path.is_dir() => Self::file(&path.join(default)),
            Some(path) => Self::file(path),
            None => Self::file(Path::new(default)),
        }
    }

    /// The file at a path.
    pub fn file(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::Local(format!("{} is a directory: name a file", path.display())));
        }
        // A link goes on leading where it leads, and what is no file (a device, a pipe) is not replaced by one.
        let path = &match std::fs::symlink_metadata(path) {
            Ok(found) if found.is_symlink() => {
                std::fs::canonicalize(path).map_err(|error| at(path, &error))?
            }
            _ => path.to_owned(),
        };
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            let text =
                format!("{} is no regular file: write to - and redirect standard output", path.display());
            return Err(Error::Usage(text));
        }
        let directory = directory_of(path);
        let temporary = tempfile::Builder::new()
            .prefix(".karst-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(directory)
            .map_err(|error| at(directory, &error))?;
        Ok(Self::File { path: path.to_owned(), temporary })
    }

    /// Writes everything; the name of the file, if it is one.
    pub async fn fill(self, chunks: impl Stream<Item = io::Result<Bytes>>) -> Result<Option<PathBuf>> {
        match self {
            Self::Stdout => to_standard_output(chunks).await.map(|()| None),
            Self::File { path, temporary } => {
                let mut file = tokio::fs::File::from_std(temporary.reopen()?);
                let mut chunks = std::pin::pin!(chunks);
                while let Some(chunk) = chunks.try_next().await.map_err(broken)? {
                    file.write_all(&chunk).await.map_err(|error| at(&path, &error))?;
                }
                file.flush().await.map_err(|error| at(&path, &error))?;
                // What the server kept of it may go now, so it is on the disk first, and its name after it.
                file.sync_all().await.map_err(|error| at(&path, &error))?;
                temporary.persist(&path).map_err(|error| at(&path, &error.error))?;
                let directory = std::fs::File::open(directory_of(&path));
                directory.and_then(|directory| directory.sync_all()).map_err(|error| at(&path, &error))?;
                Ok(Some(path))
            }
        }
    }
}

/// Where a file is.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What a broken stream means.
pub fn broken(error: io::Error) -> Error {
    Error::Unreachable(format!("the transfer broke: {}", crate::error::io_text(&error)))
}

async fn to_standard_output(chunks: impl Stream<Item = io::Result<Bytes>>) -> Result<()> {
    let writer = terminal::Writer::new(terminal::Target::Stdout);
    let mut chunks = std::pin::pin!(chunks);
    while let Some(chunk) = chunks.try_next().await.map_err(broken)? {
        if !writer.write(chunk).await {
            break;
        }
    }
    writer.finish().await.map_err(stdout_error)
}

/// Opens a file that is to be sent, and its size.
pub async fn open(path: &Path) -> Result<(tokio::fs::File, u64)> {
    let file = tokio::fs::File::open(path).await.map_err(|error| at(path, &error))?;
    let metadata = file.metadata().await.map_err(|error| at(path, &error))?;
    if metadata.is_dir() {
        return Err(Error::Local(format!("{} is a directory", path.display())));
    }
    Ok((file, metadata.len()))
}

/// A header of a request; nothing where there is no value.
pub fn put(headers: &mut HeaderMap, name: &'static str, value: Option<&str>) -> Result<()> {
    if let Some(value) = value {
        let sent = HeaderValue::from_str(value);
        headers.insert(name, sent.map_err(|_| Error::Usage(format!("\"{value}\" cannot be sent")))?);
    }
    Ok(())
}

/// POST of a file, or of standard input where it is `-`. Ctrl-C gives it up; the server keeps nothing of a file that broke off.
pub async fn send(
    context: &Context,
    url: &Url,
    mut headers: HeaderMap,
    path: &Path,
    label: &str,
) -> Result<Answer> {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    let (chunks, size) = if path == Path::new(STANDARD) {
        if io::stdin().is_terminal() {
            return Err(Error::Usage("a file is not typed: name it, or redirect standard input".to_owned()));
        }
        let input = stream::unfold(terminal::read_stdin_whole(), |mut input| async move {
            input.recv().await.map(|chunk| (chunk, input))
        });
        (input.boxed(), None)
    } else {
        let (file, size) = open(path).await?;
        (ReaderStream::with_capacity(file, CHUNK).boxed(), Some(size))
    };
    let progress = context.progress(label);
    let body = streamed(progress.count(size, chunks));
    let answer = interruptible(context.client.call(Method::POST, url, headers, body)).await;
    progress.finish();
    answer
}

/// GET of a file. Ctrl-C gives it up, and what was written so far goes.
pub async fn receive(context: &Context, url: &Url, target: Target, label: &str) -> Result<Option<PathBuf>> {
    let progress = context.progress(label);
    let written = interruptible(async {
        let response = context.client.send(Method::GET, url, HeaderMap::new(), empty()).await?;
        let size = response.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        target.fill(progress.count(size, body_chunks(response))).await
    })
    .await;
    progress.finish();
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    #[tokio::test]
    async fn a_file_appears_when_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c1.tar.gz");
        let cut = stream::iter([
            Ok(Bytes::from_static(b"one")),
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends here")),
        ]);
        let error = Target::file(&path).unwrap().fill(cut).await.unwrap_err();
        assert!(error.to_string().contains("it ends here"), "{error}");
        assert!(names(directory.path()).is_empty(), "nothing is left");
        let whole = stream::iter([Ok(Bytes::from_static(b"one")), Ok(Bytes::from_static(b"two"))]);
        // A directory takes it under its own name.
        let target = Target::of(Some(directory.path()), "c1.tar.gz").unwrap();
        assert_eq!(target.fill(whole).await.unwrap(), Some(path.clone()));
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
        assert_eq!(names(directory.path()), ["c1.tar.gz"]);
    }

    #[tokio::test]
    async fn what_is_no_file_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("there"), directory.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let whole = || stream::iter([Ok(Bytes::from_static(b"new"))]);
        Target::file(&link).unwrap().fill(whole()).await.unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        assert!(link.is_symlink());
        let error = Target::file(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().contains("no regular file"), "{error}");
        std::fs::remove_file(&file).unwrap();
        let error = Target::file(&link).unwrap_err();
        assert!(error.to_string().contains("no such file"), "{error}");
    }

    #[test]
    fn a_place_that_is_not_there_is_known_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let error = Target::file(&directory.path().join("no/c1.tar.gz")).unwrap_err();
        assert!(error.to_string().contains("no such file or directory"), "{error}");
    }
}
