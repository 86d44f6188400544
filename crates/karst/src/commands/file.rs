//! `file`: push, pull, create, edit, delete.

use std::{io::IsTerminal, path::PathBuf};

use super::{
    file_pull::pull,
    file_push::{create_parents, push},
};
use crate::{
    client::{
        About, Client, Kind, empty,
        files::{Attributes, FileType},
        full,
        operation::for_each,
    },
    context::{Context, interruptible, split_guest_path},
    editor,
    error::{Error, Result},
};

/// `file ...`
#[derive(Debug, clap::Subcommand)]
pub enum File {
    /// Copy local files into an instance
    Push(Push),
    /// Copy files out of an instance
    Pull(Pull),
    /// Delete files in instances
    #[command(visible_alias = "rm")]
    Delete {
        /// INSTANCE/path
        #[arg(required = true, value_name = "INSTANCE/PATH")]
        paths: Vec<String>,
        /// No complaint about what is not there
        #[arg(short, long)]
        force: bool,
    },
    /// Create an empty file, a directory or a symlink in an instance
    Create {
        /// INSTANCE/path
        #[arg(value_name = "INSTANCE/PATH")]
        path: String,
        /// Target of a symlink
        target: Option<String>,
        /// file, directory or symlink
        #[arg(long = "type", value_enum, default_value_t = NewType::File)]
        kind: NewType,
        #[command(flatten)]
        attributes: AttributeOptions,
        /// Make the directories above it
        #[arg(short = 'p', long)]
        create_dirs: bool,
    },
    /// Change a file of an instance in an editor
    Edit {
        /// INSTANCE/path
        #[arg(value_name = "INSTANCE/PATH")]
        path: String,
    },
}

/// What both directions take.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Directories too.
    pub recursive: bool,
    /// Make missing directories above the target.
    pub create_dirs: bool,
}

/// What `file create` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NewType {
    /// Empty.
    File,
    /// Empty.
    Directory,
    /// To the target given.
    Symlink,
}

/// Owner and mode.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct AttributeOptions {
    /// User id in the instance
    #[arg(long)]
    uid: Option<u32>,
    /// Group id in the instance
    #[arg(long)]
    gid: Option<u32>,
    /// Permissions, octal
    #[arg(long, value_parser = octal)]
    mode: Option<u32>,
}

impl From<AttributeOptions> for Attributes {
    fn from(options: AttributeOptions) -> Self {
        Self { uid: options.uid, gid: options.gid, mode: options.mode }
    }
}

/// Options of `file push`.
#[derive(Debug, clap::Args)]
pub struct Push {
    /// Local files, "-" is stdin; then INSTANCE/path, ending in / to mean a directory
    #[arg(required = true, num_args = 2.., value_names = ["FILE", "INSTANCE/PATH"])]
    paths: Vec<String>,
    #[command(flatten)]
    attributes: AttributeOptions,
    /// Directories with all that is in them
    #[arg(short, long)]
    recursive: bool,
    /// Make the directories above the target
    #[arg(short = 'p', long)]
    create_dirs: bool,
}

/// Options of `file pull`.
#[derive(Debug, clap::Args)]
pub struct Pull {
    /// Files as INSTANCE/path; then a local file or directory, "-" is stdout
    #[arg(required = true, num_args = 2.., value_names = ["INSTANCE/PATH", "FILE"])]
    paths: Vec<String>,
    /// Directories with all that is in them
    #[arg(short, long)]
    recursive: bool,
    /// Make the local directories
    #[arg(short = 'p', long)]
    create_dirs: bool,
}

impl File {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::Push(mut options) => {
                let target = options.paths.pop().unwrap_or_default();
                let (instance, path) = split_guest_path(&target)?;
                let how = Options { recursive: options.recursive, create_dirs: options.create_dirs };
                let kind = if client.files_of().is_some() { Kind::Volume } else { Kind::Instance };
                push(context, &options.paths, instance, path, options.attributes.into(), how)
                    .await
                    .about(client, kind, instance)
            }
            Self::Pull(mut options) => {
                let target = options.paths.pop().unwrap_or_default();
                let how = Options { recursive: options.recursive, create_dirs: options.create_dirs };
                interruptible(pull(context, &options.paths, &PathBuf::from(target), how)).await
            }
            Self::Delete { paths, force } => {
                for_each(&paths, |target| async move {
                    let (instance, path) = split_guest_path(&target)?;
                    match client.delete_file(instance, path).await {
                        Err(error) if force && error.is_not_found() => Ok(()),
                        other => other.map_err(|error| naming(client, error, &target)),
                    }
                })
                .await
            }
            Self::Create { path, target, kind, attributes, create_dirs } => {
                let (instance, inside) = split_guest_path(&path)?;
                let inside = inside.trim_end_matches('/');
                let (kind, body) = match (kind, target, path.ends_with('/')) {
                    (NewType::Symlink, Some(target), _) => (FileType::Symlink, full(target)),
                    (NewType::Symlink, None, _) => {
                        return Err(Error::Usage("a symlink needs a target".to_owned()));
                    }
                    (_, Some(_), _) => {
                        return Err(Error::Usage("a target is for --type symlink only".to_owned()));
                    }
                    (NewType::Directory, None, _) | (NewType::File, None, true) => {
                        (FileType::Directory, empty())
                    }
                    (NewType::File, None, false) => (FileType::File, empty()),
                };
                if create_dirs {
                    create_parents(client, instance, inside).await?;
                }
                client
                    .put_file(instance, inside, kind, attributes.into(), body)
                    .await
                    .map_err(|error| naming(client, error, &path))
            }
            Self::Edit { path } => edit(context, &path).await,
        }
    }
}

/// Fetches a file, lets the user change it and puts it back with owner and mode; from stdin where that is no terminal.
async fn edit(context: &Context, target: &str) -> Result<()> {
    let client = &context.client;
    let (instance, path) = split_guest_path(target)?;
    let file = client.file(instance, path).await.map_err(|error| naming(client, error, target))?;
    if file.kind != FileType::File {
        return Err(Error::Local(format!("{target} is no regular file")));
    }
    let attributes = file.attributes;
    let before = file.bytes(client).await?;
    let after = if std::io::stdin().is_terminal() {
        let suffix = path
            .rsplit('/')
            .next()
            .and_then(|name| name.rsplit_once('.'))
            .map(|(_, suffix)| format!(".{suffix}"));
        let copy =
            tempfile::Builder::new().prefix("karst-").suffix(suffix.as_deref().unwrap_or("")).tempfile()?;
        std::fs::write(copy.path(), &before)?;
        editor::run(copy.path())?;
        std::fs::read(copy.path())?
    } else {
        use std::io::Read as _;
        let mut text = Vec::new();
        std::io::stdin().lock().read_to_end(&mut text)?;
        text
    };
    if after == before {
        return Ok(());
    }
    client
        .put_file(instance, path, FileType::File, attributes, full(after))
        .await
        .map_err(|error| naming(client, error, target))
}

/// Says of which file a refusal is, and whether the file or the instance is what is missing.
pub fn naming(client: &Client, error: Error, target: &str) -> Error {
    let instance = target.split('/').next().unwrap_or(target);
    match error {
        // Which volume or pool is missing the message says.
        Error::Api { status: 404, message }
            if client.files_of().is_some() && ["volume", "pool"].iter().any(|w| message.contains(w)) =>
        {
            Error::Api { status: 404, message }
        }
        Error::Api { status: 404, message } => {
            if message.to_lowercase().contains("instance") {
                let missing: Result<()> = Err(Error::Api { status: 404, message });
                return missing.about(client, Kind::Instance, instance).expect_err("an error stays one");
            }
            Error::Api { status: 404, message: format!("{target}: no such file or directory") }
        }
        Error::Api { status, message } if !message.contains(target) => {
            Error::Api { status, message: format!("{target}: {message}") }
        }
        other => other,
    }
}

fn octal(text: &str) -> std::result::Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err("permissions are octal digits such as 0644".to_owned()),
    }
}
