//! `copy`: of instances and of their snapshots.

use serde_json::json;

use super::{completion::complete, object::config_object};
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::Result,
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
    #[arg(long, value_name = "PROJECT")]
    from_project: Option<String>,
    /// Start it
    #[arg(long)]
    start: bool,
    /// A copy that is there already becomes what the original is now: what it lacks is taken over, what only it has goes
    #[arg(long, conflicts_with_all = ["start", "config"])]
    refresh: bool,
}

impl Copy {
    /// Copies an instance.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let project = self.from_project.as_deref().unwrap_or(client.project());
        let body = json!({
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
            let answer = client.post(&Url::new(&["instances"]), &body).await?;
            context.finish(answer, format!("copying {}", self.name)).await
        };
        work.await.about(client, Kind::Instance, &self.name).map(drop)
    }
}
