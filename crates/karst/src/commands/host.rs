//! `host`: what Karst says of the machine below; an addition to the API of Incus.

use crate::{
    client::{Url, empty},
    context::Context,
    error::Result,
    output,
};
use hyper::{HeaderMap, Method};

/// `host ...`
#[derive(Debug, clap::Subcommand)]
pub enum Host {
    /// Show accelerator, versions and what the host can do, as YAML
    Info,
    /// Stop all guests in order, then the server; what ran starts again with it
    Shutdown,
}

impl Host {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Info => {
                let answer = context.client.get(&Url::new(&["karst", "host"])).await?;
                output::print(&output::to_yaml(&answer.metadata)?)
            }
            Self::Shutdown => {
                let url = Url::raw("/internal/shutdown");
                context.client.call(Method::PUT, &url, HeaderMap::new(), empty()).await.map(drop)
            }
        }
    }
}
