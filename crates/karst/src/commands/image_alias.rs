//! `image alias`.

use serde_json::json;

use super::{completion::complete, image::resolve};
use crate::{
    client::{About, Client, Kind, Url, operation::for_each},
    context::Context,
    error::Result,
    output::{
        member,
        table::{FormatOption, List},
        units,
    },
};

/// `image alias ...`
#[derive(Debug, clap::Subcommand)]
pub enum Alias {
    /// Give an image a name
    Create {
        /// New alias
        alias: String,
        /// Fingerprint or another alias
        #[arg(add = complete(Kind::Image))]
        image: String,
    },
    /// List aliases
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Let an alias mean another image
    Set {
        /// Alias
        #[arg(add = complete(Kind::Image))]
        alias: String,
        /// Fingerprint or another alias
        #[arg(add = complete(Kind::Image))]
        image: String,
    },
    /// Rename an alias
    Rename {
        /// Alias
        #[arg(add = complete(Kind::Image))]
        alias: String,
        /// Its new name
        new_name: String,
    },
    /// Delete aliases, not their images
    #[command(visible_alias = "rm")]
    Delete {
        /// Aliases
        #[arg(required = true, add = complete(Kind::Image))]
        aliases: Vec<String>,
    },
}

impl Alias {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::Create { alias, image } => {
                let target = resolve(client, &image).await?;
                add_alias(client, &alias, &target).await
            }
            Self::Set { alias, image } => {
                let target = resolve(client, &image).await?;
                let url = Url::new(&["images", "aliases", &alias]);
                let read = client.get(&url).await.about(client, Kind::Image, &alias)?;
                let body = json!({"target": target, "description": member(&read.metadata, "description")});
                let etag = read.etag.as_deref();
                client.change(hyper::Method::PUT, &url, &body, etag).await.map(drop)
            }
            Self::List { format } => {
                let objects =
                    client.get(&Url::new(&["images", "aliases"]).with("recursion", 1)).await?.metadata;
                let columns = &["ALIAS", "FINGERPRINT", "TYPE", "DESCRIPTION"];
                let list = List::of(columns, objects, |alias| {
                    vec![
                        member(alias, "name"),
                        units::short(&member(alias, "target")).to_owned(),
                        member(alias, "type").to_uppercase(),
                        member(alias, "description"),
                    ]
                });
                list.print(format.format)
            }
            Self::Rename { alias, new_name } => {
                let answer =
                    client.post(&Url::new(&["images", "aliases", &alias]), &json!({"name": new_name})).await;
                answer.about(client, Kind::Image, &alias).map(drop)
            }
            Self::Delete { aliases } => {
                for_each(&aliases, |alias| async move {
                    let answer = client.delete(&Url::new(&["images", "aliases", &alias])).await;
                    answer.about(client, Kind::Image, &alias).map(drop)
                })
                .await
            }
        }
    }
}

/// Gives a fingerprint a name.
pub async fn add_alias(client: &Client, alias: &str, fingerprint: &str) -> Result<()> {
    let body = json!({"name": alias, "target": fingerprint});
    client.post(&Url::new(&["images", "aliases"]), &body).await.map(drop)
}
