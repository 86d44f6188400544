//! `copy`: of instances and of their snapshots.

use serde_json::{Value, json};

use super::{completion::complete, object::config_object};
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::{Error, Result},
};

/// What is to be copied.
#[derive(Debug, clap::Args)]
pub struct Copy {
    /// Instance, or INSTANCE/SNAPSHOT
    #[arg(add = complete(Kind::Instance))]
    name: String,
    /// Name of the copy
    new_name: String,
    /// Without the snapshots
    #[arg(long)]
    instance_only: bool,
    /// Keys that are to be different
    #[arg(short, long = "config", value_name = "KEY=VALUE")]
    config: Vec<String>,
    /// Project of the original; the copy goes to the one of --project
    #[arg(long, value_name = "PROJECT", add = complete(Kind::Project))]
    from_project: Option<String>,
    /// Project of the copy, instead of the one of --project
    #[arg(long, visible_alias = "target-project", value_name = "PROJECT", add = complete(Kind::Project))]
    to_project: Option<String>,
    /// Pool of the copy's root disk; that of the original otherwise
    #[arg(short = 's', long, visible_alias = "storage", value_name = "POOL", add = complete(Kind::Pool))]
    to_pool: Option<String>,
    /// Start it
    #[arg(long)]
    start: bool,
    /// A copy that is there already becomes what the original is now: what it lacks is taken over, what only it has goes
    #[arg(long, conflicts_with_all = ["start", "config", "to_pool"])]
    refresh: bool,
}

impl Copy {
    /// Copies an instance.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let project = self.from_project.as_deref().unwrap_or(client.project());
        let mut url = Url::new(&["instances"]);
        if let Some(to) = &self.to_project {
            url = url.with("project", to);
        }
        let mut body = json!({
            "name": self.new_name,
            "config": config_object(&self.config)?,
            "start": self.start,
            "source": {
                "type": "copy",
                "source": self.name,
                "project": project,
                "instance_only": self.instance_only,
                "refresh": self.refresh,
            },
        });
        let work = async {
            if let Some(pool) = &self.to_pool {
                let original = self.name.split('/').next().unwrap_or_default();
                let of = Url::new(&["instances", original]).with("project", project);
                body["devices"] = root_in(pool, &client.get(&of).await?.metadata)?;
            }
            let answer = client.post(&url, &body).await?;
            context.finish(answer, format!("copying {}", self.name)).await
        };
        work.await.about(client, Kind::Instance, &self.name).map(drop)
    }
}

/// The root disk of an instance, in another pool: a device is replaced whole.
fn root_in(pool: &str, instance: &Value) -> Result<Value> {
    let mut devices = instance["expanded_devices"].as_object().into_iter().flatten();
    let root = devices.find(|(_, device)| device["type"] == "disk" && device["path"] == "/");
    let (name, device) = root.ok_or_else(|| Error::local("the server does not say what its root disk is"))?;
    let mut device = device.clone();
    device["pool"] = json!(pool);
    Ok(json!({ name: device }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_keeps_its_other_keys() {
        let instance = json!({"expanded_devices": {
            "eth0": {"type": "nic", "network": "n"},
            "data": {"type": "disk", "path": "/srv", "pool": "default"},
            "root": {"type": "disk", "path": "/", "pool": "default", "size": "10GiB"},
        }});
        assert_eq!(
            root_in("fast", &instance).unwrap(),
            json!({"root": {"type": "disk", "path": "/", "pool": "fast", "size": "10GiB"}})
        );
        assert!(root_in("fast", &json!({"expanded_devices": {}})).is_err());
    }
}
