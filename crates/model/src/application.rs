//! Application containers: one program of an image of the OCI in place of an init, described by `oci.*` keys that the image
//! fills in when the instance is made.

use crate::{Config, Error, Result, image::Application, instance::Instance, keys::set, signal};

/// Marks an instance as one; the platform's own, as Incus calls it.
pub const MARK: &str = "volatile.container.oci";

/// Property of an image, as its instances have it: the signal that asks the program to end. A property and no `oci.*` key,
/// because Incus has no such key and takes any property.
pub const STOP_SIGNAL: &str = "image.stop_signal";

impl Instance {
    /// Is it an application container?
    pub fn is_application(&self) -> bool {
        self.volatile.get(MARK).is_some_and(|v| v == "true")
    }
}

/// Keys that an image gives its instances; those that are said already stay.
pub fn fill_in(config: &mut Config, image: &Application) {
    let mut add = |key: String, value: String| {
        config.entry(key).or_insert(value);
    };
    add("oci.entrypoint".into(), join(&image.command));
    add("oci.cwd".into(), image.cwd.clone());
    add("oci.uid".into(), image.uid.to_string());
    add("oci.gid".into(), image.gid.to_string());
    for (name, value) in &image.environment {
        add(format!("environment.{name}"), value.clone());
    }
}

/// The program of an application container out of its expanded configuration, without the environment, which all have.
///
/// # Errors
/// Invalid, naming the key.
pub fn parse(config: &Config) -> Result<Application> {
    let field = "config.oci.entrypoint";
    let text = set(config, "oci.entrypoint").unwrap_or_default();
    let command = split(text).ok_or_else(|| Error::invalid(field, "a quote is not closed"))?;
    if command.is_empty() {
        return Err(Error::invalid(
            field,
            "the image names no program to run; set oci.entrypoint, such as oci.entrypoint=\"/bin/sleep 1000\"",
        ));
    }
    if command.iter().any(|w| w.contains(['\n', '\r', '\0'])) {
        return Err(Error::invalid(field, "a program's arguments cannot contain line breaks"));
    }
    let cwd = set(config, "oci.cwd").unwrap_or("/").to_owned();
    if !cwd.starts_with('/') || cwd.contains(['\n', '\r', '\0']) {
        return Err(Error::invalid("config.oci.cwd", format!("{cwd:?} is not an absolute path")));
    }
    let id = |key: &str| set(config, key).and_then(|v| v.parse().ok()).unwrap_or(0);
    let stop_signal = set(config, STOP_SIGNAL)
        .map(|text| {
            signal::parse(text).ok_or_else(|| {
                let field = format!("config.{STOP_SIGNAL}");
                Error::invalid(field, format!("{text:?} is no signal, such as SIGQUIT"))
            })
        })
        .transpose()?;
    Ok(Application {
        command,
        cwd,
        uid: id("oci.uid"),
        gid: id("oci.gid"),
        environment: Default::default(),
        stop_signal,
    })
}

/// Refuses keys of application containers in a configuration of another.
///
/// # Errors
/// Invalid, naming the key.
pub fn demand_none(config: &Config) -> Result<()> {
    match config.iter().find(|(k, v)| k.starts_with("oci.") && !v.is_empty()) {
        Some((key, _)) => Err(Error::invalid(
            format!("config.{key}"),
            "this is a key of application containers, which are made of images of the OCI",
        )),
        None => Ok(()),
    }
}

/// Words as a shell reads them back.
pub fn join(words: &[String]) -> String {
    let plain =
        |w: &str| !w.is_empty() && w.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./:=,+@%".contains(&b));
    let word = |w: &String| match plain(w) {
        true => w.clone(),
        false => format!("'{}'", w.replace('\'', "'\\''")),
    };
    words.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Words of a line with a shell's quotes, and nothing else of a shell; `None` for a quote that is not closed.
pub fn split(text: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (vec![], None::<String>, None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None | Some('"'), '\\') => word.get_or_insert_default().push(chars.next()?),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_as_they_were() {
        for words in [&["/bin/sh", "-c", "echo 'a' \"b\" $x; \\"][..], &["", " ", "a=b"], &["x"]] {
            let words: Vec<String> = words.iter().map(|w| w.to_string()).collect();
            assert_eq!(split(&join(&words)).unwrap(), words);
        }
        assert_eq!(split(r#"a "b c" d\ e"#).unwrap(), ["a", "b c", "d e"]);
        assert_eq!(split("'open"), None);
        assert_eq!(join(&["/bin/sleep".into(), "1000".into()]), "/bin/sleep 1000");
    }

    #[test]
    fn what_the_user_said_stays() {
        let mut config = Config::from([("oci.uid".to_owned(), "5".to_owned())]);
        let image = Application {
            command: vec!["/bin/a b".into()],
            cwd: "/srv".into(),
            uid: 7,
            gid: 7,
            environment: [("A".to_owned(), "1".to_owned())].into(),
            stop_signal: None,
        };
        fill_in(&mut config, &image);
        let parsed = parse(&config).unwrap();
        assert_eq!((parsed.uid, parsed.gid, parsed.cwd.as_str()), (5, 7, "/srv"));
        assert_eq!((parsed.command[0].as_str(), config["environment.A"].as_str()), ("/bin/a b", "1"));
        assert_eq!(parsed.stop_signal, None);
        config.insert(STOP_SIGNAL.into(), "SIGQUIT".into());
        assert_eq!(parse(&config).unwrap().stop_signal, Some(3));
        for (key, value) in
            [("oci.entrypoint", ""), ("oci.entrypoint", "'a"), ("oci.cwd", "srv"), (STOP_SIGNAL, "SIGNOPE")]
        {
            let mut bad = config.clone();
            bad.insert(key.into(), value.into());
            assert_eq!(parse(&bad).unwrap_err().field, Some(format!("config.{key}")));
        }
        assert_eq!(demand_none(&config).unwrap_err().field.as_deref(), Some("config.oci.cwd"));
    }
}
