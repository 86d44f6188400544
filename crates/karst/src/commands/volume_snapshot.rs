//! `storage volume snapshot`.

use serde_json::{Value, json};

use super::{
    backup::print_name,
    completion::{Below, complete_below},
    expiry,
    object::{Object, parse_settings},
    snapshot,
    volume::Which,
};
use crate::{
    client::{About, Kind, Url, operation::for_each},
    context::Context,
    error::Result,
    output::{
        member,
        table::{FormatOption, List},
        units,
    },
};

/// `storage volume snapshot ...`
#[derive(Debug, clap::Subcommand)]
pub enum VolumeSnapshot {
    /// Make a snapshot of a volume
    Create {
        #[command(flatten)]
        which: Which,
        /// Name of the snapshot; the server chooses one otherwise
        snapshot: Option<String>,
        /// When it goes by itself: a time (RFC 3339), a span such as 12h or 7d, or never (default: what snapshots.expiry says)
        #[arg(long, value_name = "WHEN", value_parser = expiry::parse)]
        expires: Option<String>,
        /// Description
        #[arg(long)]
        description: Option<String>,
    },
    /// List the snapshots of a volume
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Show a snapshot as YAML
    Show {
        #[command(flatten)]
        which: Which,
        /// Snapshot
        #[arg(add = complete_below(Below::VolumeSnapshot))]
        snapshot: String,
    },
    /// Set what can change: expires_at (a time, a span such as 7d, or never), description
    Set {
        #[command(flatten)]
        which: Which,
        /// Snapshot
        #[arg(add = complete_below(Below::VolumeSnapshot))]
        snapshot: String,
        /// Properties
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Change a snapshot in an editor, or replace what can change by YAML on stdin
    Edit {
        #[command(flatten)]
        which: Which,
        /// Snapshot
        #[arg(add = complete_below(Below::VolumeSnapshot))]
        snapshot: String,
    },
    /// Put a volume back to a snapshot
    Restore {
        #[command(flatten)]
        which: Which,
        /// Snapshot
        #[arg(add = complete_below(Below::VolumeSnapshot))]
        snapshot: String,
    },
    /// Rename a snapshot
    Rename {
        #[command(flatten)]
        which: Which,
        /// Snapshot
        #[arg(add = complete_below(Below::VolumeSnapshot))]
        snapshot: String,
        /// Its new name
        new_name: String,
    },
    /// Delete snapshots
    #[command(visible_alias = "rm")]
    Delete {
        #[command(flatten)]
        which: Which,
        /// Snapshots
        #[arg(required = true, add = complete_below(Below::VolumeSnapshot))]
        snapshots: Vec<String>,
    },
}

fn volume_url(which: &Which) -> Result<Url> {
    Ok(Url::new(&["storage-pools", &which.pool, "volumes", "custom", which.custom()?]))
}

/// A snapshot as an object with fields.
fn object(which: &Which, name: &str) -> Result<Object> {
    Ok(Object {
        url: volume_url(which)?.join("snapshots").join(name),
        kind: Kind::VolumeSnapshot,
        name: format!("{}/{name}", which.name),
        fields: &["description", "expires_at"],
    })
}

impl VolumeSnapshot {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::Create { which, snapshot, expires, description } => {
                let mut body = json!({});
                for (field, value) in
                    [("name", &snapshot), ("expires_at", &expires), ("description", &description)]
                {
                    if let Some(value) = value {
                        body[field] = json!(value);
                    }
                }
                let work = async {
                    let answer = client.post(&volume_url(&which)?.join("snapshots"), &body).await?;
                    context.finish(answer, format!("snapshot of {}", which.name)).await
                };
                let operation = work.await.about(client, Kind::Volume, &which.name)?;
                print_name(snapshot.is_none(), operation.as_ref(), "storage_volume_snapshots")
            }
            Self::List { which, format } => {
                let url = volume_url(&which)?.join("snapshots").with("recursion", 1);
                let objects = client.get(&url).await.about(client, Kind::Volume, &which.name)?.metadata;
                list(objects).print(format.format)
            }
            Self::Show { which, snapshot } => object(&which, &snapshot)?.show(context).await,
            Self::Set { which, snapshot, keys } => {
                let pairs = snapshot::properties(parse_settings(&keys)?)?;
                object(&which, &snapshot)?.set(context, pairs, true).await
            }
            Self::Edit { which, snapshot } => object(&which, &snapshot)?.edit(context).await,
            Self::Restore { which, snapshot } => {
                let body = json!({"restore": snapshot});
                let work = async {
                    let answer = client.change(hyper::Method::PUT, &volume_url(&which)?, &body, None).await?;
                    context.finish(answer, format!("restoring {}", which.name)).await
                };
                work.await.about(client, Kind::Volume, &which.name).map(drop)
            }
            Self::Rename { which, snapshot, new_name } => {
                object(&which, &snapshot)?.rename(context, &new_name).await
            }
            Self::Delete { which, snapshots } => {
                for_each(&snapshots, |name| {
                    let object = object(&which, &name);
                    async move { object?.delete(context).await }
                })
                .await
            }
        }
    }
}

fn list(objects: Value) -> List {
    List::of(&["NAME", "TAKEN AT", "EXPIRES AT", "DESCRIPTION"], objects, |snapshot| {
        let name = member(snapshot, "name");
        vec![
            // In lists it stands behind that of the volume.
            name.rsplit('/').next().unwrap_or(&name).to_owned(),
            units::time(&member(snapshot, "created_at")),
            units::time(&member(snapshot, "expires_at")),
            member(snapshot, "description"),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_paths() {
        let objects =
            json!([{"name": "data/s1", "expires_at": "0001-01-01T00:00:00Z", "description": "first"}]);
        assert_eq!(list(objects).render("csv".parse().unwrap()).unwrap(), "s1,,,first\n");
        let which = Which { pool: "fast".to_owned(), name: "data".to_owned() };
        assert_eq!(
            object(&which, "s1").unwrap().url.render(None),
            "/1.0/storage-pools/fast/volumes/custom/data/snapshots/s1"
        );
    }
}
