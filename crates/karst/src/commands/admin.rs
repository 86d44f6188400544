//! `admin`: work on the server as a whole.

use std::io::{BufRead, IsTerminal};

use serde_json::{Value, json};

use crate::{
    client::Url,
    context::Context,
    error::{Error, Result},
    output::{self, member},
};

/// `admin ...`
#[derive(Debug, clap::Subcommand)]
pub enum Admin {
    /// Find instances and volumes that are on storage pools and not in the database, and bring them back
    Recover(Recover),
}

/// `admin recover`
#[derive(Debug, clap::Args)]
pub struct Recover {
    /// A pool that the database does not know either: its name, and how it was made
    #[arg(long = "pool", value_name = "NAME=DRIVER:SOURCE")]
    pools: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Only say what would be recovered
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
}

impl Admin {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Recover(recover) => recover.run(context).await,
        }
    }
}

/// `NAME=DRIVER:SOURCE` as the API has it.
fn unknown_pool(text: &str) -> Result<Value> {
    let parts = text.split_once('=').and_then(|(name, made)| Some((name, made.split_once(':')?)));
    match parts {
        Some((name, (driver, source))) if !name.is_empty() && !driver.is_empty() => {
            let config = if source.is_empty() { json!({}) } else { json!({"source": source}) };
            Ok(json!({"name": name, "driver": driver, "config": config}))
        }
        _ => Err(Error::Usage(format!(
            "\"{text}\" is not NAME=DRIVER:SOURCE, such as data=dir:/srv/data or data=btrfs:/dev/sdb"
        ))),
    }
}

/// What was found, for people.
fn report(found: &Value) -> String {
    let mut text = String::new();
    let list = |name: &str| found[name].as_array().cloned().unwrap_or_default();
    let unknown = list("UnknownVolumes");
    if unknown.is_empty() {
        text.push_str("nothing was found that the database does not know\n");
    }
    for volume in unknown {
        let count = volume["snapshotCount"].as_u64().unwrap_or_default();
        text.push_str(&format!(
            "{} {} on pool {} in project {}{}\n",
            member(&volume, "type"),
            member(&volume, "name"),
            member(&volume, "pool"),
            member(&volume, "project"),
            match count {
                0 => String::new(),
                1 => ", 1 snapshot".into(),
                n => format!(", {n} snapshots"),
            }
        ));
    }
    for line in list("UnclearVolumes") {
        text.push_str(&format!("cannot be recovered: {}\n", line.as_str().unwrap_or_default()));
    }
    for line in list("DependencyErrors") {
        text.push_str(&format!("missing, make it first: {}\n", line.as_str().unwrap_or_default()));
    }
    text
}

impl Recover {
    async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let known: Vec<Value> = client.get_as(&Url::new(&["storage-pools"]).with("recursion", 1)).await?;
        let mut pools: Vec<Value> = known.iter().map(|pool| json!({"name": pool["name"]})).collect();
        for pool in &self.pools {
            pools.push(unknown_pool(pool)?);
        }
        let body = json!({"pools": pools});
        let found = client.post(&Url::raw("/internal/recover/validate"), &body).await?.metadata;
        output::print(&report(&found))?;
        let any = |name: &str| found[name].as_array().is_some_and(|all| !all.is_empty());
        if any("DependencyErrors") {
            return Err(Error::local("nothing was recovered: something that is needed is missing"));
        }
        let nothing = !any("UnknownVolumes") && self.pools.is_empty();
        if nothing || self.dry_run {
            return Ok(());
        }
        if !self.yes {
            if !std::io::stdin().is_terminal() {
                return Err(Error::local(
                    "nothing was recovered; say --yes to have it done without being asked",
                ));
            }
            crate::error::report_line("recover all of this? (yes/no)");
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line)?;
            if !matches!(line.trim(), "y" | "yes") {
                return Ok(());
            }
        }
        client.post(&Url::raw("/internal/recover/import"), &body).await?;
        output::print("recovered\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_and_findings() {
        assert_eq!(
            unknown_pool("data=dir:/srv/data").unwrap(),
            json!({"name": "data", "driver": "dir", "config": {"source": "/srv/data"}})
        );
        assert_eq!(
            unknown_pool("data=btrfs:").unwrap(),
            json!({"name": "data", "driver": "btrfs", "config": {}})
        );
        for wrong in ["data", "data=dir", "=dir:/x", "data=:/x"] {
            assert!(unknown_pool(wrong).is_err(), "{wrong}");
        }
        let found = json!({
            "UnknownVolumes": [
                {"name": "c1", "type": "container", "snapshotCount": 2, "project": "default", "pool": "p"},
                {"name": "v1", "type": "volume", "snapshotCount": 0, "project": "team", "pool": "p"},
            ],
            "DependencyErrors": ["Project \"team\""],
            "UnclearVolumes": ["volume x in pool \"p\": nothing is said of it"],
        });
        assert_eq!(
            report(&found),
            "container c1 on pool p in project default, 2 snapshots\n\
             volume v1 on pool p in project team\n\
             cannot be recovered: volume x in pool \"p\": nothing is said of it\n\
             missing, make it first: Project \"team\"\n"
        );
        assert_eq!(report(&json!({})), "nothing was found that the database does not know\n");
    }
}
