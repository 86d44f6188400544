//! `move`: of instances to other pools, projects and names.

use serde_json::{Value, json};

use super::{completion::complete, object::config_object};
use crate::{
    client::{About, Kind},
    context::Context,
    error::{Error, Result},
};

/// What is to be moved, and where to.
#[derive(Debug, clap::Args)]
pub struct Move {
    /// Instance
    #[arg(add = complete(Kind::Instance))]
    name: String,
    /// New name
    new_name: Option<String>,
    /// Pool of its root disk; a virtual machine may run meanwhile if that is all
    #[arg(short = 's', long, visible_alias = "storage", value_name = "POOL", add = complete(Kind::Pool))]
    to_pool: Option<String>,
    /// Project
    #[arg(long, visible_alias = "target-project", value_name = "PROJECT", add = complete(Kind::Project))]
    to_project: Option<String>,
    /// Keys that are to be different
    #[arg(short, long = "config", value_name = "KEY=VALUE")]
    config: Vec<String>,
    /// Profiles there, instead of those of the same names (repeatable)
    #[arg(short, long = "profile", value_name = "NAME", add = complete(Kind::Profile))]
    profiles: Vec<String>,
    /// No profile there
    #[arg(long, conflicts_with = "profiles")]
    no_profiles: bool,
}

impl Move {
    /// Moves it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let body = self.body()?;
        let work = async {
            let answer = client.post(&super::lifecycle::instance_url(&self.name), &body).await?;
            context.finish(answer, format!("moving {}", self.name)).await
        };
        work.await.about(client, Kind::Instance, &self.name).map(drop)
    }

    /// The request: a plain change of the name is one too, and cheaper.
    fn body(&self) -> Result<Value> {
        if self.name.contains('/') {
            return Err(Error::Usage(format!(
                "a snapshot stays with its instance (karst rename {} NEW_NAME gives it another name)",
                self.name
            )));
        }
        let name = self.new_name.as_ref().unwrap_or(&self.name);
        let plain = self.config.is_empty() && self.profiles.is_empty() && !self.no_profiles;
        if self.to_pool.is_none() && self.to_project.is_none() && plain {
            return match &self.new_name {
                Some(name) => Ok(json!({"name": name})),
                None => Err(Error::Usage(
                    "say where to: a new name, --to-pool POOL or --to-project PROJECT".to_owned(),
                )),
            };
        }
        let mut body = json!({"name": name, "migration": true});
        if let Some(pool) = &self.to_pool {
            body["pool"] = json!(pool);
        }
        if let Some(project) = &self.to_project {
            body["project"] = json!(project);
        }
        if !self.config.is_empty() {
            body["config"] = config_object(&self.config)?;
        }
        if self.no_profiles || !self.profiles.is_empty() {
            body["profiles"] = json!(self.profiles);
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(name: &str, new_name: Option<&str>, pool: Option<&str>) -> Result<Value> {
        let own = |text: &str| text.to_owned();
        let one = Move {
            name: own(name),
            new_name: new_name.map(own),
            to_pool: pool.map(own),
            to_project: None,
            config: vec![],
            profiles: vec![],
            no_profiles: false,
        };
        one.body()
    }

    #[test]
    fn places() {
        assert_eq!(to("a", Some("b"), None).unwrap(), json!({"name": "b"}));
        let moved = to("a", None, Some("fast")).unwrap();
        assert_eq!(moved, json!({"name": "a", "migration": true, "pool": "fast"}));
        assert_eq!(to("a", None, None).unwrap_err().exit_code(), 2);
        let error = to("a/s1", Some("b"), None).unwrap_err();
        assert!(error.to_string().contains("karst rename a/s1"), "{error}");
    }
}
