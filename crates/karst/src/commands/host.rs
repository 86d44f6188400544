//! `host`: what Karst says of the machine below; an addition to the API of Incus.

use crate::{client::Url, context::Context, error::Result, output};

/// `host ...`
#[derive(Debug, clap::Subcommand)]
pub enum Host {
    /// Show accelerator, versions and what the host can do, as YAML
    Info,
}

impl Host {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Info => {
                let answer = context.client.get(&Url::new(&["karst", "host"])).await?;
                output::print(&output::to_yaml(&answer.metadata)?)
            }
        }
    }
}
