//! `storage`: pools; volumes are in `volume`.

use serde_json::{Value, json};

use super::{
    common::Common,
    completion::{complete, complete_driver},
    object::{Object, config_object, create},
    volume::Volume,
};
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::Result,
    output::{
        self, member,
        table::{FormatOption, List},
        units,
    },
};

/// `storage ...`
#[derive(Debug, clap::Subcommand)]
pub enum Storage {
    /// List pools
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a pool
    Create {
        /// Its name
        name: String,
        /// dir, btrfs, zfs or lvm, as far as the host has them
        #[arg(add = complete_driver())]
        driver: String,
        /// Its keys
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// Description
        #[arg(long)]
        description: Option<String>,
    },
    /// Show a pool's space and who uses it
    Info {
        /// Its name
        #[arg(add = complete(Kind::Pool))]
        name: String,
        /// Space in bytes
        #[arg(long)]
        bytes: bool,
    },
    /// Volumes
    #[command(subcommand)]
    Volume(Volume),
    #[command(flatten)]
    Common(Common),
}

/// A pool as an object with fields.
fn pool(name: &str) -> Object {
    Object {
        url: Url::new(&["storage-pools", name]),
        kind: Kind::Pool,
        name: name.to_owned(),
        fields: &["config", "description"],
    }
}

impl Storage {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::List { format } => {
                let objects = client.get(&Url::new(&["storage-pools"]).with("recursion", 1)).await?.metadata;
                let columns = &["NAME", "DRIVER", "SOURCE", "DESCRIPTION", "USED BY", "STATE"];
                let list = List::of(columns, objects, |pool| {
                    vec![
                        member(pool, "name"),
                        member(pool, "driver"),
                        member(&pool["config"], "source"),
                        member(pool, "description"),
                        pool["used_by"].as_array().map_or(0, Vec::len).to_string(),
                        member(pool, "status").to_uppercase(),
                    ]
                });
                list.print(format.format)
            }
            Self::Create { name, driver, keys, description } => {
                let mut body = json!({"name": name, "driver": driver, "config": config_object(&keys)?});
                if let Some(description) = description {
                    body["description"] = json!(description);
                }
                create(context, &Url::new(&["storage-pools"]), body, format!("creating storage pool {name}"))
                    .await
            }
            Self::Info { name, bytes } => {
                let object = pool(&name);
                let space = object.url.clone().join("resources");
                let (answer, resources) = tokio::try_join!(client.get(&object.url), client.get(&space))
                    .about(client, Kind::Pool, &name)?;
                // Servers of Incus do not say that.
                let found = client.get(&Url::new(&["karst", "storage-pools", &name])).await.ok();
                let can = found.map_or(Value::Null, |found| found.metadata["file_system"].clone());
                output::print(&info(&answer.metadata, &resources.metadata, &can, bytes)?)
            }
            Self::Volume(command) => command.run(context).await,
            Self::Common(command) => command.run(context, pool).await,
        }
    }
}

/// A pool for people, as YAML.
fn info(pool: &Value, resources: &Value, can: &Value, exact: bool) -> Result<String> {
    let size = |value: &Value| {
        let value = value.as_u64().unwrap_or_default();
        if exact { value.to_string() } else { units::bytes(value) }
    };
    let mut shown = json!({"info": {
        "name": pool["name"], "description": pool["description"], "driver": pool["driver"],
        "space used": size(&resources["space"]["used"]), "total space": size(&resources["space"]["total"]),
    }});
    // Names of what its file system can, and of what it cannot.
    if let Some(can) = can.as_object() {
        let those = |wanted: bool| {
            let all = can.iter().filter(|(_, value)| value.as_bool() == Some(wanted));
            all.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        };
        shown["file system"] = json!({"has": those(true), "lacks": those(false)});
    }
    let mut users: std::collections::BTreeMap<String, Vec<String>> = std::collections::BTreeMap::new();
    for url in pool["used_by"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let path = url.split('?').next().unwrap_or(url).trim_start_matches("/1.0/");
        let (kind, name) = path.split_once('/').unwrap_or(("", path));
        users.entry(kind.to_owned()).or_default().push(name.to_owned());
    }
    if !users.is_empty() {
        shown["used by"] = json!(users);
    }
    output::to_yaml(&shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_for_people() {
        let pool = json!({"name": "default", "description": "", "driver": "dir",
            "used_by": ["/1.0/instances/c1", "/1.0/profiles/default?project=default", "/1.0/instances/c2"]});
        let resources = json!({"space": {"used": 1_073_741_824u64, "total": 2_147_483_648u64}});
        insta::assert_snapshot!(info(&pool, &resources, &Value::Null, false).unwrap());
        let can = json!({"direct": true, "mapped": false, "owners": true});
        let shown = info(&pool, &resources, &can, false).unwrap();
        assert!(shown.contains("has: direct, owners") && shown.contains("lacks: mapped"), "{shown}");
    }
}
