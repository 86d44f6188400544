//! `storage volume`.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{
    backup::{Contents, Owner},
    completion::{Below, complete, complete_below},
    file::File,
    object::{Object, config_object, create, parse_settings},
    volume_backup::{Import, VolumeBackup},
    volume_snapshot::VolumeSnapshot,
};
use crate::{
    client::{About, Kind, Url, operation::for_each},
    context::Context,
    error::{Error, Result},
    output::{
        member,
        table::{FormatOption, List},
    },
};

/// A volume of a pool.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// Pool
    #[arg(add = complete(Kind::Pool))]
    pub pool: String,
    /// Volume, or TYPE/NAME where the type is not custom
    #[arg(add = complete_below(Below::Volume))]
    pub name: String,
}

/// `storage volume ...`
#[derive(Debug, clap::Subcommand)]
pub enum Volume {
    /// List the volumes of a pool
    #[command(visible_alias = "ls")]
    List {
        /// Pool
        #[arg(add = complete(Kind::Pool))]
        pool: String,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a volume
    Create {
        #[command(flatten)]
        which: Which,
        /// Its keys, such as size=10GiB
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// filesystem or block
        #[arg(long = "type", value_name = "TYPE", default_value = "filesystem")]
        content: String,
        /// Description
        #[arg(long)]
        description: Option<String>,
    },
    /// Show a volume as YAML
    Show {
        #[command(flatten)]
        which: Which,
    },
    /// Print the value of a key
    Get {
        #[command(flatten)]
        which: Which,
        /// Key
        key: String,
        /// A property of the volume itself, such as description
        #[arg(short, long)]
        property: bool,
    },
    /// Set keys
    Set {
        #[command(flatten)]
        which: Which,
        /// Keys
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// Properties of the volume itself
        #[arg(short, long)]
        property: bool,
    },
    /// Remove a key
    Unset {
        #[command(flatten)]
        which: Which,
        /// Key
        key: String,
        /// A property of the volume itself
        #[arg(short, long)]
        property: bool,
    },
    /// Change a volume in an editor, or replace its configuration by YAML on stdin
    Edit {
        #[command(flatten)]
        which: Which,
    },
    /// Rename a volume
    Rename {
        #[command(flatten)]
        which: Which,
        /// Its new name
        new_name: String,
    },
    /// Copy a volume with its snapshots
    #[command(visible_alias = "cp")]
    Copy {
        #[command(flatten)]
        which: Which,
        /// Name of the copy
        new_name: String,
        #[command(flatten)]
        to: To,
        /// Without the snapshots
        #[arg(long)]
        volume_only: bool,
        /// A copy that is there already becomes what the original is now
        #[arg(long)]
        refresh: bool,
    },
    /// Move a volume to another pool, project or name
    #[command(visible_alias = "mv")]
    Move {
        #[command(flatten)]
        which: Which,
        /// New name
        new_name: Option<String>,
        #[command(flatten)]
        to: To,
    },
    /// Delete volumes
    #[command(visible_alias = "rm")]
    Delete {
        /// Pool
        #[arg(add = complete(Kind::Pool))]
        pool: String,
        /// Volumes
        #[arg(required = true, add = complete_below(Below::Volume))]
        names: Vec<String>,
    },
    /// Write a volume with its snapshots to a file
    Export {
        #[command(flatten)]
        which: Which,
        /// File or directory; default: VOLUME.tar.gz in this directory; "-" is stdout
        file: Option<PathBuf>,
        #[command(flatten)]
        contents: Contents,
    },
    /// Make a volume of a file: a backup, or the image of a disc
    Import(Import),
    /// Backups of volumes that the server keeps
    #[command(subcommand)]
    Backup(VolumeBackup),
    /// Snapshots of volumes
    #[command(subcommand)]
    Snapshot(VolumeSnapshot),
    /// Make a volume empty again
    Rebuild {
        #[command(flatten)]
        which: Which,
    },
    /// Files of volumes: as `karst file`, with VOLUME/path instead of INSTANCE/path
    File {
        /// Pool
        #[arg(add = complete(Kind::Pool))]
        pool: String,
        #[command(subcommand)]
        command: File,
    },
}

/// Where a volume is to be.
#[derive(Debug, clap::Args)]
pub struct To {
    /// Pool; the same if none
    #[arg(long, value_name = "POOL", add = complete(Kind::Pool))]
    to_pool: Option<String>,
    /// Project; the same if none
    #[arg(long, value_name = "PROJECT", add = complete(Kind::Project))]
    to_project: Option<String>,
}

/// A volume as an object with fields.
fn volume(pool: &str, name: &str) -> Object {
    let (kind, short) = match name.split_once('/') {
        Some((kind @ ("custom" | "container" | "virtual-machine" | "image"), short)) => (kind, short),
        _ => ("custom", name),
    };
    Object {
        url: Url::new(&["storage-pools", pool, "volumes", kind, short]),
        kind: Kind::Volume,
        name: name.to_owned(),
        fields: &["config", "description"],
    }
}

impl Which {
    fn object(&self) -> Object {
        volume(&self.pool, &self.name)
    }

    /// The name of a custom volume: others are kept with what they are of.
    pub fn custom(&self) -> Result<&str> {
        match self.name.split_once('/') {
            Some(("custom", name)) => Ok(name),
            Some(("container" | "virtual-machine", instance)) => Err(Error::Usage(format!(
                "the volume of an instance is kept with it: karst export {instance}, karst snapshot create {instance}"
            ))),
            Some(("image", image)) => Err(Error::Usage(format!(
                "the volume of an image is kept with it: karst image export {image}"
            ))),
            _ => Ok(&self.name),
        }
    }
}

impl Volume {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::List { pool, format } => {
                let url = Url::new(&["storage-pools", &pool, "volumes"]).with("recursion", 1);
                let objects = client.get(&url).await.about(client, Kind::Pool, &pool)?.metadata;
                list(objects).print(format.format)
            }
            Self::Create { which, keys, content, description } => {
                let mut body =
                    json!({"name": which.name, "content_type": content, "config": config_object(&keys)?});
                if let Some(description) = description {
                    body["description"] = json!(description);
                }
                let url = Url::new(&["storage-pools", &which.pool, "volumes", "custom"]);
                let created = create(context, &url, body, format!("creating volume {}", which.name)).await;
                created.about(client, Kind::Pool, &which.pool)
            }
            Self::Show { which } => which.object().show(context).await,
            Self::Get { which, key, property } => which.object().print_key(context, &key, property).await,
            Self::Set { which, keys, property } => {
                which.object().set(context, parse_settings(&keys)?, property).await
            }
            Self::Unset { which, key, property } => which.object().unset(context, &key, property).await,
            Self::Edit { which } => which.object().edit(context).await,
            Self::Rename { which, new_name } => which.object().rename(context, &new_name).await,
            Self::Copy { which, new_name, to, volume_only, refresh } => {
                let pool = to.to_pool.as_deref().unwrap_or(&which.pool);
                let mut url = Url::new(&["storage-pools", pool, "volumes", "custom"]);
                if let Some(project) = &to.to_project {
                    url = url.with("project", project);
                }
                let body = json!({
                    "name": new_name,
                    "type": "custom",
                    "source": {
                        "type": "copy",
                        "name": which.name,
                        "pool": which.pool,
                        "project": client.project(),
                        "volume_only": volume_only,
                        "refresh": refresh,
                    },
                });
                let label = format!("copying volume {}", which.name);
                create(context, &url, body, label).await.about(client, Kind::Volume, &which.name)
            }
            Self::Move { which, new_name, to } => {
                let body = json!({
                    "name": new_name.as_ref().unwrap_or(&which.name),
                    "pool": to.to_pool.as_ref().unwrap_or(&which.pool),
                    "project": to.to_project,
                });
                let work = async {
                    let answer = client.post(&which.object().url, &body).await?;
                    context.finish(answer, format!("moving volume {}", which.name)).await
                };
                work.await.about(client, Kind::Volume, &which.name).map(drop)
            }
            Self::Delete { pool, names } => {
                for_each(&names, |name| {
                    let object = volume(&pool, &name);
                    async move { object.delete(context).await }
                })
                .await
            }
            Self::Export { which, file, contents } => {
                Owner::volume(&which)?.export(context, &contents, file.as_deref()).await
            }
            Self::Import(options) => options.run(context).await,
            Self::Backup(command) => command.run(context).await,
            Self::Snapshot(command) => command.run(context).await,
            Self::Rebuild { which } => {
                which.custom()?;
                let work = async {
                    let answer = client.post(&which.object().url.join("rebuild"), &json!({})).await?;
                    context.finish(answer, format!("emptying volume {}", which.name)).await
                };
                work.await.about(client, Kind::Volume, &which.name).map(drop)
            }
            Self::File { pool, command } => command.run(&context.for_volumes(pool)).await,
        }
    }
}

fn list(objects: Value) -> List {
    let columns = &["TYPE", "NAME", "DESCRIPTION", "CONTENT-TYPE", "SIZE", "USED BY"];
    let mut list = List::of(columns, objects, |volume| {
        vec![
            member(volume, "type"),
            member(volume, "name"),
            member(volume, "description"),
            member(volume, "content_type"),
            member(&volume["config"], "size"),
            volume["used_by"].as_array().map_or(0, Vec::len).to_string(),
        ]
    });
    list.rows.sort();
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_of_other_types() {
        assert_eq!(volume("p", "data").url.render(None), "/1.0/storage-pools/p/volumes/custom/data");
        assert_eq!(volume("p", "container/c1").url.render(None), "/1.0/storage-pools/p/volumes/container/c1");
        assert_eq!(
            volume("p", "odd/name").url.render(None),
            "/1.0/storage-pools/p/volumes/custom/odd%2Fname"
        );
        let which = |name: &str| Which { pool: "p".to_owned(), name: name.to_owned() };
        assert_eq!(which("custom/data").custom().unwrap(), "data");
        assert_eq!(which("data").custom().unwrap(), "data");
        let error = which("container/c1").custom().unwrap_err();
        assert!(error.to_string().contains("karst export c1"), "{error}");
    }
}
