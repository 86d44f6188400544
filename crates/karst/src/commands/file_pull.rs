//! Copying files and trees of guests to this machine. A guest is not trusted.

use std::{
    collections::HashSet,
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Component, Path, PathBuf},
};

use futures::{Stream, StreamExt};
use tokio::io::AsyncWriteExt;

use super::file::{Options, naming};
use crate::{
    client::files::{FileType, GuestFile},
    context::{Context, at, split_guest_path},
    error::{Error, Result},
    output::stdout_error,
    terminal,
};

/// Copies files of instances to `target` on this machine.
pub async fn pull(context: &Context, sources: &[String], target: &Path, options: Options) -> Result<()> {
    let to_stdout = target == Path::new("-");
    let named_directory = target.as_os_str().as_bytes().ends_with(b"/");
    if options.create_dirs && !to_stdout {
        let directory = if named_directory || sources.len() > 1 { Some(target) } else { target.parent() };
        if let Some(directory) = directory.filter(|path| !path.as_os_str().is_empty()) {
            std::fs::create_dir_all(directory).map_err(|error| at(directory, &error))?;
        }
    }
    let into_directory = named_directory || sources.len() > 1 || target.is_dir();
    if into_directory && !to_stdout && !target.is_dir() {
        return Err(Error::Local(format!("{} is no directory (--create-dirs makes it)", target.display())));
    }
    for source in sources {
        let (instance, path) = split_guest_path(source)?;
        let file = context.client.file(instance, path).await;
        let file = file.map_err(|error| naming(&context.client, error, source))?;
        if to_stdout {
            to_standard_output(context, file, source).await?;
            continue;
        }
        if file.kind == FileType::Directory && !options.recursive {
            return Err(Error::Local(format!("{source} is a directory (--recursive copies it)")));
        }
        let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let name = if name.is_empty() { instance } else { name };
        let local = if into_directory { target.join(safe_name(name)?) } else { target.to_owned() };
        tree(context, instance, path.trim_end_matches('/').to_owned(), local, file).await?;
    }
    Ok(())
}

/// A file, or a directory and all below. A guest is not trusted: names with slashes are refused, and nothing is
/// written through a link that came from the guest.
async fn tree(
    context: &Context,
    instance: &str,
    path: String,
    local: PathBuf,
    first: GuestFile,
) -> Result<()> {
    let client = &context.client;
    let mut first = Some(first);
    let mut links: HashSet<PathBuf> = HashSet::new();
    let mut work = vec![(path, local)];
    while let Some((path, local)) = work.pop() {
        let source = format!("{instance}{path}");
        let file = match first.take() {
            Some(file) => file,
            None => client.file(instance, &path).await.map_err(|error| naming(client, error, &source))?,
        };
        if local.ancestors().any(|above| links.contains(above)) {
            return Err(Error::Local(format!("{source}: lies below a symlink")));
        }
        let mode = file.attributes.mode;
        match file.kind {
            FileType::Directory => {
                match std::fs::create_dir(&local) {
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && local.is_dir() => {}
                    other => other.map_err(|error| at(&local, &error))?,
                }
                let mut names = file.entries(client).await?;
                names.sort_by(|a, b| b.cmp(a));
                for name in names {
                    let name = safe_name(&name)?;
                    work.push((format!("{path}/{name}"), local.join(name)));
                }
            }
            FileType::Symlink => {
                let target = file.bytes(client).await?;
                let target = OsStr::from_bytes(target.trim_ascii_end());
                remove_old(&local)?;
                std::os::unix::fs::symlink(target, &local).map_err(|error| at(&local, &error))?;
                links.insert(local);
            }
            FileType::File => {
                let progress = context.progress(&source);
                let chunks = progress.count(file.size, file.chunks());
                write_file(&local, mode, chunks).await?;
            }
        }
    }
    Ok(())
}

/// Writes a new file beside the old one and puts it in its place when it is whole.
async fn write_file(
    local: &Path,
    mode: Option<u32>,
    chunks: impl Stream<Item = std::io::Result<bytes::Bytes>>,
) -> Result<()> {
    if local.exists() && !local.is_file() {
        // A device or pipe named by the user is written to, not replaced.
        let mut file =
            tokio::fs::OpenOptions::new().write(true).open(local).await.map_err(|error| at(local, &error))?;
        return copy(local, chunks, &mut file).await;
    }
    let directory = local.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new()
        .prefix(".karst-")
        .tempfile_in(directory)
        .map_err(|error| at(local, &error))?;
    let mut file = tokio::fs::File::from_std(temporary.reopen()?);
    copy(local, chunks, &mut file).await?;
    // Never set-user-id on this side: the owner is another one here.
    let permissions = std::fs::Permissions::from_mode(mode.unwrap_or(0o644) & 0o777);
    temporary.as_file().set_permissions(permissions).map_err(|error| at(local, &error))?;
    temporary.persist(local).map_err(|error| at(local, &error.error))?;
    Ok(())
}

async fn copy(
    local: &Path,
    chunks: impl Stream<Item = std::io::Result<bytes::Bytes>>,
    file: &mut tokio::fs::File,
) -> Result<()> {
    let mut chunks = std::pin::pin!(chunks);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| Error::Unreachable(format!("the transfer broke: {error}")))?;
        file.write_all(&chunk).await.map_err(|error| at(local, &error))?;
    }
    file.flush().await.map_err(|error| at(local, &error))
}

async fn to_standard_output(context: &Context, file: GuestFile, source: &str) -> Result<()> {
    match file.kind {
        FileType::Directory => Err(Error::Local(format!("{source} is a directory"))),
        FileType::Symlink => crate::output::write(&file.bytes(&context.client).await?),
        FileType::File => {
            let writer = terminal::Writer::new(terminal::Target::Stdout);
            let mut chunks = std::pin::pin!(file.chunks());
            while let Some(chunk) = chunks.next().await {
                let chunk =
                    chunk.map_err(|error| Error::Unreachable(format!("the transfer broke: {error}")))?;
                if !writer.write(chunk).await {
                    break;
                }
            }
            writer.finish().await.map_err(stdout_error)
        }
    }
}

/// Removes what is in the way of a symlink, never a directory.
fn remove_old(local: &Path) -> Result<()> {
    match std::fs::remove_file(local) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|error| at(local, &error)),
    }
}

/// A name that is one component: what a guest calls its files must not lead elsewhere.
fn safe_name(name: &str) -> Result<&str> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == OsStr::new(name) => Ok(name),
        _ => Err(Error::Local(format!(
            "the instance has a file with the impossible name \"{}\"",
            name.escape_debug()
        ))),
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_guests_stay_in_their_directory() {
        assert_eq!(safe_name("a b").unwrap(), "a b");
        for bad in ["", ".", "..", "a/b", "/etc", "../x", "a/"] {
            assert!(safe_name(bad).is_err(), "{bad}");
        }
    }
}
