//! Copying files and trees of this machine into a guest.

use std::{
    ffi::OsStr,
    fs::Metadata,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use tokio_util::io::ReaderStream;

use super::file::{Options, naming};
use crate::{
    client::{
        Body, Client, empty,
        files::{Attributes, FileType},
        full,
        transport::{CHUNK, streamed},
    },
    context::{Context, at},
    error::{Error, Result},
    terminal,
};

/// Copies local files into `path` of an instance.
pub async fn push(
    context: &Context,
    sources: &[String],
    instance: &str,
    path: &str,
    attributes: Attributes,
    options: Options,
) -> Result<()> {
    let into_directory = path.ends_with('/') || sources.len() > 1;
    let root = path.trim_end_matches('/');
    let push = Pusher { context, instance, attributes };
    if options.create_dirs {
        let made_for =
            if into_directory || options.recursive { format!("{root}/x") } else { root.to_owned() };
        create_parents(&context.client, instance, &made_for).await?;
    }
    for source in sources {
        if source == "-" {
            if into_directory {
                return Err(Error::Usage("what comes from stdin needs a file name as target".to_owned()));
            }
            push.stdin(root).await?;
            continue;
        }
        let local = Path::new(source);
        let metadata = std::fs::metadata(local).map_err(|error| at(local, &error))?;
        if metadata.is_dir() && !options.recursive {
            return Err(Error::Local(format!("{source} is a directory (--recursive copies it)")));
        }
        let target = if into_directory || metadata.is_dir() {
            let full = std::fs::canonicalize(local).map_err(|error| at(local, &error))?;
            format!("{root}/{}", text(local.file_name().or_else(|| full.file_name()).unwrap_or_default())?)
        } else {
            root.to_owned()
        };
        push.tree(local, target, metadata).await?;
    }
    Ok(())
}

/// Where and as whom files are pushed.
struct Pusher<'a> {
    context: &'a Context,
    instance: &'a str,
    attributes: Attributes,
}

impl Pusher<'_> {
    /// A file, or a directory and all below; links below it stay links.
    async fn tree(&self, local: &Path, target: String, metadata: Metadata) -> Result<()> {
        let mut work = vec![(local.to_owned(), target, metadata)];
        while let Some((local, target, metadata)) = work.pop() {
            if metadata.is_symlink() {
                let link = std::fs::read_link(&local).map_err(|error| at(&local, &error))?;
                self.put(&target, FileType::Symlink, &metadata, full(link.as_os_str().as_bytes().to_vec()))
                    .await?;
            } else if metadata.is_dir() {
                self.put(&target, FileType::Directory, &metadata, empty()).await?;
                let mut entries = std::fs::read_dir(&local)
                    .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
                    .map_err(|error| at(&local, &error))?;
                // The stack turns the order around.
                entries.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
                for entry in entries {
                    let metadata = entry.metadata().map_err(|error| at(&entry.path(), &error))?;
                    work.push((entry.path(), format!("{target}/{}", text(&entry.file_name())?), metadata));
                }
            } else if metadata.is_file() {
                let file = tokio::fs::File::open(&local).await.map_err(|error| at(&local, &error))?;
                let progress = self.context.progress(local.display().to_string());
                let chunks = progress.count(Some(metadata.len()), ReaderStream::with_capacity(file, CHUNK));
                self.put(&target, FileType::File, &metadata, streamed(chunks)).await?;
            } else {
                return Err(Error::Local(format!(
                    "{}: neither file, directory nor symlink",
                    local.display()
                )));
            }
        }
        Ok(())
    }

    async fn put(&self, target: &str, kind: FileType, metadata: &Metadata, body: Body) -> Result<()> {
        let mode = (kind != FileType::Symlink).then(|| metadata.permissions().mode() & 0o7777);
        let own = Attributes { uid: Some(metadata.uid()), gid: Some(metadata.gid()), mode };
        let given = self.attributes;
        let mut attributes =
            Attributes { uid: given.uid.or(own.uid), gid: given.gid.or(own.gid), mode: own.mode };
        if kind == FileType::File {
            attributes.mode = given.mode.or(own.mode);
        }
        self.send(target, kind, attributes, body).await
    }

    async fn stdin(&self, target: &str) -> Result<()> {
        let input = futures::stream::unfold(terminal::read_stdin_whole(), |mut input| async move {
            input.recv().await.map(|data| (data, input))
        });
        let progress = self.context.progress(target);
        let body = streamed(progress.count(None, input));
        self.send(target, FileType::File, self.attributes, body).await
    }

    async fn send(&self, target: &str, kind: FileType, attributes: Attributes, body: Body) -> Result<()> {
        self.context
            .client
            .put_file(self.instance, target, kind, attributes, body)
            .await
            .map_err(|error| naming(&self.context.client, error, &format!("{}{target}", self.instance)))
    }
}

/// Makes the directories above `path`; those that exist stay as they are.
pub async fn create_parents(client: &Client, instance: &str, path: &str) -> Result<()> {
    let mut made = String::new();
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    parts.pop();
    for part in parts {
        made.push('/');
        made.push_str(part);
        match client.file(instance, &made).await {
            Ok(file) if file.kind == FileType::File => {
                return Err(Error::Local(format!("{instance}{made} is no directory")));
            }
            Ok(_) => {}
            Err(error) if error.is_not_found() => {
                let attributes = Attributes { mode: Some(0o755), ..Attributes::default() };
                let created =
                    client.put_file(instance, &made, FileType::Directory, attributes, empty()).await;
                created.map_err(|error| naming(client, error, &format!("{instance}{made}")))?;
            }
            Err(error) => return Err(naming(client, error, &format!("{instance}{made}"))),
        }
    }
    Ok(())
}
/// A local name as text; the API has no others.
fn text(name: &OsStr) -> Result<&str> {
    name.to_str().ok_or_else(|| Error::Local(format!("the name {name:?} is no UTF-8")))
}
