//! `export`, `import` and `backup`: instances as files in Incus' backup format. What they share with those of volumes is
//! here too.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{
    completion::{Below, complete, complete_below},
    expiry,
    transfer::{Target, put, receive, send},
    volume::Which,
};
use crate::{
    client::{About, Kind, Operation, Url, operation::for_each, url::last_segment},
    context::{Context, interruptible},
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        units,
    },
};

/// How long the backup behind an export may stay in the server, should nobody be left to delete it.
const FORGOTTEN: &str = "1d";

/// What a backup holds.
#[derive(Debug, clap::Args)]
pub struct Contents {
    /// Compression: gzip (the default), zstd, xz, bzip2 or none
    #[arg(long, value_name = "NAME", default_value = "gzip", hide_default_value = true,
          value_parser = ["gzip", "zstd", "xz", "bzip2", "none"])]
    compression: String,
    /// Without the snapshots
    #[arg(long, visible_aliases = ["instance-only", "volume-only"])]
    without_snapshots: bool,
}

/// Options of `export`.
#[derive(Debug, clap::Args)]
pub struct Export {
    /// Instance
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// File or directory; default: INSTANCE.tar.gz in this directory; "-" is stdout
    file: Option<PathBuf>,
    #[command(flatten)]
    contents: Contents,
}

/// Options of `import`.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// Backup; "-" is stdin
    file: PathBuf,
    /// Name of the instance; the one in the backup otherwise
    name: Option<String>,
    /// Storage pool of its root disk; the one in the backup otherwise
    #[arg(short, long, value_name = "POOL", add = complete(Kind::Pool))]
    storage: Option<String>,
}

/// `backup ...`
#[derive(Debug, clap::Subcommand)]
pub enum Backup {
    /// Make a backup that the server keeps
    Create {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Name; the server chooses one otherwise
        name: Option<String>,
        #[command(flatten)]
        contents: Contents,
        /// When it goes by itself: a time (RFC 3339), a span such as 12h or 7d, or never
        #[arg(long, value_name = "WHEN", value_parser = expiry::parse)]
        expires: Option<String>,
    },
    /// List the backups of an instance
    #[command(visible_alias = "ls")]
    List {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Show a backup as YAML
    Show {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Backup
        #[arg(add = complete_below(Below::Backup))]
        name: String,
    },
    /// Write a backup to a file
    Export {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Backup
        #[arg(add = complete_below(Below::Backup))]
        name: String,
        /// File or directory; default: INSTANCE-BACKUP.backup in this directory; "-" is stdout
        file: Option<PathBuf>,
    },
    /// Rename a backup
    Rename {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Backup
        #[arg(add = complete_below(Below::Backup))]
        name: String,
        /// Its new name
        new_name: String,
    },
    /// Delete backups
    #[command(visible_alias = "rm")]
    Delete {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Backups
        #[arg(required = true, add = complete_below(Below::Backup))]
        names: Vec<String>,
    },
}

/// What backups are of.
#[derive(Debug, Clone)]
pub struct Owner {
    url: Url,
    kind: Kind,
    name: String,
}

impl Owner {
    /// An instance.
    pub fn instance(name: &str) -> Result<Self> {
        if name.contains('/') {
            return Err(Error::Usage(format!(
                "backups are of whole instances: copy the snapshot first (karst copy {name} NEW_NAME)"
            )));
        }
        Ok(Self { url: Url::new(&["instances", name]), kind: Kind::Instance, name: name.to_owned() })
    }

    /// A custom volume.
    pub fn volume(which: &Which) -> Result<Self> {
        let name = which.custom()?;
        let url = Url::new(&["storage-pools", &which.pool, "volumes", "custom", name]);
        Ok(Self { url, kind: Kind::Volume, name: name.to_owned() })
    }

    fn backups(&self) -> Url {
        self.url.clone().join("backups")
    }

    fn backup(&self, name: &str) -> Url {
        self.backups().join(name)
    }

    /// How messages name one of its backups, and their kind.
    fn words(&self, name: &str) -> (Kind, String) {
        let kind = if self.kind == Kind::Instance { Kind::Backup } else { Kind::VolumeBackup };
        (kind, format!("{}/{name}", self.name))
    }

    /// Has a backup made.
    pub async fn create(
        &self,
        context: &Context,
        name: Option<&str>,
        contents: &Contents,
        expires: Option<&str>,
    ) -> Result<Option<Operation>> {
        let mut body = json!({"compression_algorithm": contents.compression});
        let only = if self.kind == Kind::Instance { "instance_only" } else { "volume_only" };
        body[only] = json!(contents.without_snapshots);
        if let Some(name) = name {
            body["name"] = json!(name);
        }
        if let Some(expires) = expires {
            body["expires_at"] = json!(expires);
        }
        let work = async {
            let answer = interruptible(context.client.post(&self.backups(), &body)).await?;
            context.finish(answer, format!("backing up {}", self.name)).await
        };
        work.await.about(&context.client, self.kind, &self.name)
    }

    /// `backup create`: prints the name where the server chose it.
    pub async fn keep(
        &self,
        context: &Context,
        name: Option<&str>,
        contents: &Contents,
        expires: Option<&str>,
    ) -> Result<()> {
        let operation = self.create(context, name, contents, expires).await?;
        match (name, operation.as_ref().and_then(|operation| operation.resource("backups"))) {
            (None, Some(chosen)) => output::line(&last_segment(chosen)),
            _ => Ok(()),
        }
    }

    /// Makes a backup, writes it to a file and deletes it, also when the file could not be written.
    pub async fn export(&self, context: &Context, contents: &Contents, file: Option<&Path>) -> Result<()> {
        let default = format!("{}.{}", self.name, extension(&contents.compression));
        let target = Target::of(file, &default)?;
        let name = format!("export-{}-{:x}", std::process::id(), jiff::Timestamp::now().as_nanosecond());
        let expires = expiry::parse(FORGOTTEN).map_err(Error::local)?;
        self.create(context, Some(&name), contents, Some(&expires)).await?;
        let written = receive(context, &self.backup(&name).join("export"), target, &self.label()).await;
        let deleted = self.delete(context, &name).await;
        let written = written?;
        deleted?;
        print_path(written)
    }

    fn label(&self) -> String {
        format!("exporting {}", self.name)
    }

    /// Writes a backup that is there to a file.
    pub async fn fetch(&self, context: &Context, name: &str, file: Option<&Path>) -> Result<()> {
        let target = Target::of(file, &format!("{}-{name}.backup", self.name))?;
        let written = receive(context, &self.backup(name).join("export"), target, &self.label()).await;
        let (kind, words) = self.words(name);
        print_path(written.about(&context.client, kind, &words)?)
    }

    /// Lists them.
    pub async fn list(&self, context: &Context, format: FormatOption) -> Result<()> {
        let client = &context.client;
        let answer = client.get(&self.backups().with("recursion", 1)).await;
        let objects = answer.about(client, self.kind, &self.name)?.metadata;
        let list = List::of(&["NAME", "TAKEN AT", "EXPIRES AT", "SNAPSHOTS"], objects, |backup| {
            let without = backup["instance_only"] == true || backup["volume_only"] == true;
            vec![
                member(backup, "name"),
                units::time(&member(backup, "created_at")),
                units::time(&member(backup, "expires_at")),
                output::yes_no(!without),
            ]
        });
        list.print(format.format)
    }

    /// Prints one.
    pub async fn show(&self, context: &Context, name: &str) -> Result<()> {
        let (kind, words) = self.words(name);
        let answer = context.client.get(&self.backup(name)).await.about(&context.client, kind, &words)?;
        output::print(&output::to_yaml(&answer.metadata)?)
    }

    /// Renames one.
    pub async fn rename(&self, context: &Context, name: &str, new_name: &str) -> Result<()> {
        let (kind, words) = self.words(name);
        let work = async {
            let answer = context.client.post(&self.backup(name), &json!({"name": new_name})).await?;
            context.finish(answer, format!("renaming {words}")).await
        };
        work.await.about(&context.client, kind, &words).map(drop)
    }

    /// Deletes one.
    pub async fn delete(&self, context: &Context, name: &str) -> Result<()> {
        let (kind, words) = self.words(name);
        let work = async {
            let answer = interruptible(context.client.delete(&self.backup(name))).await?;
            context.finish(answer, format!("deleting {words}")).await
        };
        work.await.about(&context.client, kind, &words).map(drop)
    }

    /// Deletes several.
    pub async fn delete_all(&self, context: &Context, names: &[String]) -> Result<()> {
        for_each(names, |name| async move { self.delete(context, &name).await }).await
    }
}

/// What files of this compression are called.
fn extension(compression: &str) -> &'static str {
    match compression {
        "zstd" => "tar.zst",
        "xz" => "tar.xz",
        "bzip2" => "tar.bz2",
        "none" => "tar",
        _ => "tar.gz",
    }
}

fn print_path(path: Option<PathBuf>) -> Result<()> {
    path.map_or(Ok(()), |path| output::line(&path.display().to_string()))
}

impl Export {
    /// Writes the file.
    pub async fn run(self, context: &Context) -> Result<()> {
        Owner::instance(&self.instance)?.export(context, &self.contents, self.file.as_deref()).await
    }
}

impl Import {
    /// Sends the file.
    pub async fn run(self, context: &Context) -> Result<()> {
        let mut headers = hyper::HeaderMap::new();
        put(&mut headers, "x-incus-name", self.name.as_deref())?;
        put(&mut headers, "x-incus-pool", self.storage.as_deref())?;
        let answer = send(context, &Url::new(&["instances"]), headers, &self.file, "sending").await?;
        let operation = context.finish(answer, "importing").await?;
        print_name(self.name.is_none(), operation.as_ref(), "instances")
    }
}

/// The name that an imported thing got where the user did not say one.
pub fn print_name(wanted: bool, operation: Option<&Operation>, kind: &str) -> Result<()> {
    match operation.and_then(|operation| operation.resource(kind)) {
        Some(path) if wanted => output::line(&last_segment(path)),
        _ => Ok(()),
    }
}

impl Backup {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Create { instance, name, contents, expires } => {
                let owner = Owner::instance(&instance)?;
                owner.keep(context, name.as_deref(), &contents, expires.as_deref()).await
            }
            Self::List { instance, format } => Owner::instance(&instance)?.list(context, format).await,
            Self::Show { instance, name } => Owner::instance(&instance)?.show(context, &name).await,
            Self::Export { instance, name, file } => {
                Owner::instance(&instance)?.fetch(context, &name, file.as_deref()).await
            }
            Self::Rename { instance, name, new_name } => {
                Owner::instance(&instance)?.rename(context, &name, &new_name).await
            }
            Self::Delete { instance, names } => Owner::instance(&instance)?.delete_all(context, &names).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners() {
        let web = Owner::instance("web").unwrap();
        assert_eq!(web.backup("b 1").render(None), "/1.0/instances/web/backups/b%201");
        let which = Which { pool: "fast".to_owned(), name: "data".to_owned() };
        let data = Owner::volume(&which).unwrap();
        let path = "/1.0/storage-pools/fast/volumes/custom/data/backups/b1";
        assert_eq!(data.backup("b1").render(None), path);
        assert_eq!(data.words("b1"), (Kind::VolumeBackup, "data/b1".to_owned()));
        let error = Owner::instance("web/s1").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("karst copy web/s1"), "{error}");
    }
}
