//! `storage volume import` and `storage volume backup`: volumes as files.

use std::path::{Path, PathBuf};

use super::{
    backup::{Contents, Owner, print_name},
    completion::{Below, complete, complete_below},
    expiry,
    transfer::{put, send},
    volume::Which,
};
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::{Error, Result},
    output::table::FormatOption,
};

/// Options of `storage volume import`.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// Pool
    #[arg(add = complete(Kind::Pool))]
    pool: String,
    /// File; "-" is stdin
    file: PathBuf,
    /// Name of the volume; the one in the backup otherwise; a disc needs one
    name: Option<String>,
    /// backup, or iso for a disc; iso where the name of the file ends in .iso, else backup
    #[arg(long = "type", value_name = "TYPE", value_parser = ["backup", "iso"])]
    kind: Option<String>,
}

/// `storage volume backup ...`
#[derive(Debug, clap::Subcommand)]
pub enum VolumeBackup {
    /// Make a backup that the server keeps
    Create {
        #[command(flatten)]
        which: Which,
        /// Name of the backup; the server chooses one otherwise
        backup: Option<String>,
        #[command(flatten)]
        contents: Contents,
        /// When it goes by itself: a time (RFC 3339), a span such as 12h or 7d, or never
        #[arg(long, value_name = "WHEN", value_parser = expiry::parse)]
        expires: Option<String>,
    },
    /// List the backups of a volume
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Show a backup as YAML
    Show {
        #[command(flatten)]
        which: Which,
        /// Backup
        #[arg(add = complete_below(Below::VolumeBackup))]
        backup: String,
    },
    /// Write a backup to a file
    Export {
        #[command(flatten)]
        which: Which,
        /// Backup
        #[arg(add = complete_below(Below::VolumeBackup))]
        backup: String,
        /// File or directory; default: VOLUME-BACKUP.backup in this directory; "-" is stdout
        file: Option<PathBuf>,
    },
    /// Rename a backup
    Rename {
        #[command(flatten)]
        which: Which,
        /// Backup
        #[arg(add = complete_below(Below::VolumeBackup))]
        backup: String,
        /// Its new name
        new_name: String,
    },
    /// Delete backups
    #[command(visible_alias = "rm")]
    Delete {
        #[command(flatten)]
        which: Which,
        /// Backups
        #[arg(required = true, add = complete_below(Below::VolumeBackup))]
        backups: Vec<String>,
    },
}

/// What is in a file, as stated or as its name says.
fn content(stated: Option<&str>, file: &Path) -> String {
    let disc = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("iso"));
    stated.unwrap_or(if disc { "iso" } else { "backup" }).to_owned()
}

impl Import {
    /// Sends the file.
    pub async fn run(self, context: &Context) -> Result<()> {
        let content = content(self.kind.as_deref(), &self.file);
        if content == "iso" && self.name.is_none() {
            return Err(Error::Usage(
                "a disc needs a name: karst storage volume import POOL FILE NAME".to_owned(),
            ));
        }
        let mut headers = hyper::HeaderMap::new();
        put(&mut headers, "x-incus-name", self.name.as_deref())?;
        put(&mut headers, "x-incus-type", Some(&content))?;
        let url = Url::new(&["storage-pools", &self.pool, "volumes", "custom"]);
        let answer = send(context, &url, headers, &self.file, "sending").await;
        let answer = answer.about(&context.client, Kind::Pool, &self.pool)?;
        let operation = context.finish(answer, "importing").await?;
        print_name(self.name.is_none(), operation.as_ref(), "storage_volumes")
    }
}

impl VolumeBackup {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Create { which, backup, contents, expires } => {
                Owner::volume(&which)?.keep(context, backup.as_deref(), &contents, expires.as_deref()).await
            }
            Self::List { which, format } => Owner::volume(&which)?.list(context, format).await,
            Self::Show { which, backup } => Owner::volume(&which)?.show(context, &backup).await,
            Self::Export { which, backup, file } => {
                Owner::volume(&which)?.fetch(context, &backup, file.as_deref()).await
            }
            Self::Rename { which, backup, new_name } => {
                Owner::volume(&which)?.rename(context, &backup, &new_name).await
            }
            Self::Delete { which, backups } => Owner::volume(&which)?.delete_all(context, &backups).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discs_are_known_by_their_names() {
        for (stated, file, wanted) in [
            (None, "debian.iso", "iso"),
            (None, "WIN11.ISO", "iso"),
            (None, "data.tar.gz", "backup"),
            (None, "-", "backup"),
            (Some("iso"), "-", "iso"),
            (Some("backup"), "odd.iso", "backup"),
        ] {
            assert_eq!(content(stated, Path::new(file)), wanted, "{stated:?} {file}");
        }
    }
}
