//! What instances, networks, pools, volumes, profiles, projects and images have in common: show, get, set, unset, edit.

use serde_json::{Map, Value, json};

use crate::{
    client::{About, Answer, Kind, Url},
    context::Context,
    editor,
    error::{Error, Result},
    output::{self, from_yaml, member, to_yaml},
};

/// How often a change is tried when others change the same object.
const ATTEMPTS: u32 = 5;

/// One object of the server and which of its fields may be written.
#[derive(Debug, Clone)]
pub struct Object {
    /// Its path.
    pub url: Url,
    /// Its kind, for messages.
    pub kind: Kind,
    /// Its name, for messages.
    pub name: String,
    /// Fields that PUT takes.
    pub fields: &'static [&'static str],
}

impl Object {
    /// Reads it.
    pub async fn get(&self, context: &Context) -> Result<Answer> {
        context.client.get(&self.url).await.about(&context.client, self.kind, &self.name)
    }

    /// Deletes it.
    pub async fn delete(&self, context: &Context) -> Result<()> {
        let work = async {
            let answer = context.client.delete(&self.url).await?;
            context.finish(answer, format!("deleting {}", self.name)).await
        };
        work.await.about(&context.client, self.kind, &self.name).map(drop)
    }

    /// Gives it another name.
    pub async fn rename(&self, context: &Context, new_name: &str) -> Result<()> {
        let work = async {
            let answer = context.client.post(&self.url, &json!({"name": new_name})).await?;
            context.finish(answer, format!("renaming {}", self.name)).await
        };
        work.await.about(&context.client, self.kind, &self.name).map(drop)
    }

    /// Prints it as YAML.
    pub async fn show(&self, context: &Context) -> Result<()> {
        output::print(&to_yaml(&self.get(context).await?.metadata)?)
    }

    /// Prints the value of a configuration key, or of a field of the object itself.
    pub async fn print_key(&self, context: &Context, key: &str, property: bool) -> Result<()> {
        let object = self.get(context).await?.metadata;
        if property {
            let value = object
                .get(key)
                .ok_or_else(|| Error::Local(format!("{} has no property \"{key}\"", self.kind.noun())))?;
            return match value {
                Value::Array(_) | Value::Object(_) => output::print(&to_yaml(value)?),
                scalar => output::line(&output::scalar(scalar)),
            };
        }
        output::line(&member(&object["config"], key))
    }

    /// Sets configuration keys, or fields of the object itself. Read and replaced under its ETag, and again if someone
    /// was faster: a PATCH would be one request, but Incus' empties the fields that it does not name.
    pub async fn set(&self, context: &Context, pairs: Vec<(String, String)>, property: bool) -> Result<()> {
        let mut attempts = ATTEMPTS;
        loop {
            let object = self.get(context).await?;
            let mut body = self.writable(&object.metadata);
            if property {
                for (key, value) in &pairs {
                    self.check_field(key)?;
                    let value = typed_like(body.get(key), value.clone())?;
                    body.insert(key.clone(), value);
                }
            } else {
                let config = body.entry("config").or_insert(Value::Null);
                if !config.is_object() {
                    *config = json!({});
                }
                for (key, value) in &pairs {
                    config[key] = json!(value);
                }
            }
            attempts -= 1;
            match self.put(context, body, object.etag.as_deref()).await {
                Err(Error::Api { status: 412, .. }) if attempts > 0 => {}
                other => return other,
            }
        }
    }

    /// Removes a configuration key (a merge could not), or empties a field.
    pub async fn unset(&self, context: &Context, key: &str, property: bool) -> Result<()> {
        let object = self.get(context).await?;
        let mut body = self.writable(&object.metadata);
        if property {
            self.check_field(key)?;
            let value = typed_like(body.get(key), String::new())?;
            body.insert(key.to_owned(), value);
        } else {
            let removed = body
                .get_mut("config")
                .and_then(Value::as_object_mut)
                .and_then(|config| config.shift_remove(key));
            if removed.is_none() {
                return Err(Error::Local(format!(
                    "{} \"{}\" has no key \"{key}\"",
                    self.kind.noun(),
                    self.name
                )));
            }
        }
        self.put(context, body, object.etag.as_deref()).await
    }

    /// Lets the user change it in an editor, or takes it from stdin where that is no terminal.
    pub async fn edit(&self, context: &Context) -> Result<()> {
        if !editor::is_interactive() {
            let body = self.parse(&editor::from_stdin()?)?;
            return self.put(context, body, None).await;
        }
        let object = self.get(context).await?;
        let before = to_yaml(&Value::Object(self.writable(&object.metadata)))?;
        let mut text =
            format!("# {} {}: lines that begin with # are ignored\n{before}", self.kind.noun(), self.name);
        loop {
            text = editor::edit(&text, ".yaml")?;
            let outcome = match self.parse(&text) {
                Ok(body) if Value::Object(body.clone()) == from_yaml(&before)? => return Ok(()),
                Ok(body) => self.put(context, body, object.etag.as_deref()).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => return Ok(()),
                Err(error @ Error::Unreachable(_)) => return Err(error),
                Err(error) => {
                    if !editor::again(&error)? {
                        return Err(Error::Exit(1));
                    }
                }
            }
        }
    }

    /// Replaces it, if it is still the one that was read.
    pub async fn put(&self, context: &Context, body: Map<String, Value>, etag: Option<&str>) -> Result<()> {
        let work = async {
            let answer =
                context.client.change(hyper::Method::PUT, &self.url, &Value::Object(body), etag).await?;
            context.finish(answer, format!("changing {}", self.name)).await
        };
        match work.await.about(&context.client, self.kind, &self.name) {
            Err(Error::Api { status: 412, .. }) => Err(Error::Api {
                status: 412,
                message: format!(
                    "{} \"{}\" was changed by someone else meanwhile: try again",
                    self.kind.noun(),
                    self.name
                ),
            }),
            other => other.map(drop),
        }
    }

    /// The writable fields of an object that was read.
    pub fn writable(&self, object: &Value) -> Map<String, Value> {
        let fields =
            self.fields.iter().filter_map(|field| Some(((*field).to_owned(), object.get(*field)?.clone())));
        fields.collect()
    }

    fn check_field(&self, key: &str) -> Result<()> {
        if self.fields.contains(&key) && key != "config" && key != "devices" {
            return Ok(());
        }
        Err(Error::Usage(format!("\"{key}\" is no property that can be set on a {}", self.kind.noun())))
    }

    fn parse(&self, text: &str) -> Result<Map<String, Value>> {
        match from_yaml(text)? {
            object @ Value::Object(_) => Ok(self.writable(&object)),
            _ => Err(Error::local("no YAML mapping")),
        }
    }
}

/// Gives a text the type that the field had.
fn typed_like(before: Option<&Value>, text: String) -> Result<Value> {
    match before {
        Some(Value::Bool(_)) => match text.as_str() {
            "true" => Ok(json!(true)),
            "false" | "" => Ok(json!(false)),
            _ => Err(Error::Usage(format!("\"{text}\" is neither true nor false"))),
        },
        Some(Value::Number(_)) => text
            .parse::<i64>()
            .map(|n| json!(n))
            .map_err(|_| Error::Usage(format!("\"{text}\" is no number"))),
        Some(Value::Array(_)) => Ok(text
            .split(',')
            .filter(|word| !word.is_empty())
            .map(|word| json!(word))
            .collect::<Vec<_>>()
            .into()),
        _ => Ok(Value::String(text)),
    }
}

/// Makes an object and waits until it is there.
pub async fn create(context: &Context, url: &Url, body: Value, label: String) -> Result<()> {
    context.finish(context.client.post(url, &body).await?, label).await.map(drop)
}

/// `KEY=VALUE` words as the JSON object that the API wants.
pub fn config_object(words: &[String]) -> Result<Value> {
    Ok(Value::Object(parse_pairs(words)?.into_iter().map(|(key, value)| (key, json!(value))).collect()))
}

/// `KEY=VALUE` words; the value may hold anything, also `=`.
pub fn parse_pairs(words: &[String]) -> Result<Vec<(String, String)>> {
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(Error::Usage(format!("\"{word}\" is no KEY=VALUE"))),
        })
        .collect()
}

/// `KEY=VALUE...`, or the older `KEY VALUE`; the value `-` is read from stdin.
pub fn parse_settings(words: &[String]) -> Result<Vec<(String, String)>> {
    let mut pairs = match words {
        [key, value] if !key.contains('=') => vec![(key.clone(), value.clone())],
        words => parse_pairs(words)?,
    };
    for (_, value) in &mut pairs {
        if value == "-" {
            *value = editor::from_stdin()?;
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn settings() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(parse_settings(&words(&["a", "1"])).unwrap(), [pair("a", "1")]);
        assert_eq!(parse_settings(&words(&["a=1", "b=x=y"])).unwrap(), [pair("a", "1"), pair("b", "x=y")]);
        assert_eq!(parse_settings(&words(&["a=1", "b"])).unwrap_err().exit_code(), 2);
        assert_eq!(parse_settings(&words(&["=1"])).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn properties_keep_their_type() {
        assert_eq!(typed_like(Some(&json!(false)), "true".into()).unwrap(), json!(true));
        assert!(typed_like(Some(&json!(false)), "maybe".into()).is_err());
        assert_eq!(typed_like(Some(&json!(["default"])), "a,b".into()).unwrap(), json!(["a", "b"]));
        assert_eq!(typed_like(Some(&json!(3)), "4".into()).unwrap(), json!(4));
        assert_eq!(typed_like(None, "text".into()).unwrap(), json!("text"));
    }
}
