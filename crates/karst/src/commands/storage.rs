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
    /// Start a pool that is stopped
    Start {
        /// Its name
        #[arg(add = complete(Kind::Pool))]
        name: String,
    },
    /// Stop a pool: what is in it stays, and nothing can use it until it is started
    Stop {
        /// Its name
        #[arg(add = complete(Kind::Pool))]
        name: String,
    },
    /// Say that a pool begins with its host, as pools do that nobody has said anything of
    Autostart {
        /// Its name
        #[arg(add = complete(Kind::Pool))]
        name: String,
        /// It does not
        #[arg(long)]
        disable: bool,
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

/// What Incus does not tell of a pool.
fn life(name: &str) -> Url {
    Url::new(&["karst", "storage-pools", name])
}

async fn change(context: &Context, name: &str, body: Value) -> Result<()> {
    let client = &context.client;
    let changed = client.change(hyper::Method::PUT, &life(name), &body, None).await;
    changed.map(drop).about(client, Kind::Pool, name)
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
                let answer = client.get(&object.url).await.about(client, Kind::Pool, &name)?;
                // Servers of Incus do not say that.
                let life = client.get(&life(&name)).await.map_or(Value::Null, |found| found.metadata);
                // One that is stopped tells no space.
                let space = match life["active"].as_bool() {
                    Some(false) => Value::Null,
                    _ => {
                        let space = client.get(&object.url.clone().join("resources")).await;
                        space.about(client, Kind::Pool, &name)?.metadata
                    }
                };
                output::print(&info(&answer.metadata, &space, &life, bytes)?)
            }
            Self::Start { name } => change(context, &name, json!({"active": true})).await,
            Self::Stop { name } => change(context, &name, json!({"active": false})).await,
            Self::Autostart { name, disable } => change(context, &name, json!({"autostart": !disable})).await,
            Self::Volume(command) => command.run(context).await,
            Self::Common(command) => command.run(context, pool).await,
        }
    }
}

/// A pool for people, as YAML.
fn info(pool: &Value, resources: &Value, life: &Value, exact: bool) -> Result<String> {
    let size = |value: &Value| {
        let value = value.as_u64().unwrap_or_default();
        if exact { value.to_string() } else { units::bytes(value) }
    };
    let mut shown = json!({"info": {
        "name": pool["name"], "description": pool["description"], "driver": pool["driver"],
    }});
    if !resources.is_null() {
        shown["info"]["space used"] = json!(size(&resources["space"]["used"]));
        shown["info"]["total space"] = json!(size(&resources["space"]["total"]));
    }
    // What is not as of most pools.
    for key in ["active", "autostart", "persistent", "built"] {
        if life[key].as_bool() == Some(false) {
            shown["info"][key] = json!(false);
        }
    }
    // Names of what its file system can, and of what it cannot.
    if let Some(can) = life["file_system"].as_object() {
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
        let life = json!({"active": true, "autostart": true,
            "file_system": {"direct": true, "mapped": false, "owners": true}});
        let shown = info(&pool, &resources, &life, false).unwrap();
        assert!(shown.contains("has: direct, owners") && shown.contains("lacks: mapped"), "{shown}");
        assert!(!shown.contains("active") && !shown.contains("autostart"), "{shown}");
        let life = json!({"active": false, "autostart": false, "file_system": null});
        let shown = info(&pool, &Value::Null, &life, false).unwrap();
        assert!(shown.contains("active: false") && shown.contains("autostart: false"), "{shown}");
        assert!(!shown.contains("space"), "{shown}");
    }
}
