use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder with an OCI layout, and the name of one of its images.
    OciLayout(PathBuf, Option<String>),
    /// A tar archive of an OCI layout.
    OciArchive(PathBuf),
    /// A tar archive as `docker save` writes it.
    DockerArchive(PathBuf),
    /// A registry reference.
    Registry(String),
}

impl std::fmt::Display for Source {
    /// As it is parsed.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OciLayout(path, None) => write!(formatter, "oci:{}", path.display()),
            Self::OciLayout(path, Some(tag)) => write!(formatter, "oci:{}:{tag}", path.display()),
            Self::OciArchive(path) => write!(formatter, "oci-archive:{}", path.display()),
            Self::DockerArchive(path) => write!(formatter, "docker-archive:{}", path.display()),
            Self::Registry(name) => formatter.write_str(name),
        }
    }
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let source = match name.split_once(':') {
            Some(("oci", rest)) => {
                // A tag follows the last colon, where there is one after the last slash.
                let (path, tag) = match rest.rsplit_once(':') {
                    Some((path, tag)) if !tag.contains('/') && !path.is_empty() => (path, Some(tag.to_owned())),
                    _ => (rest, None),
                };
                Self::OciLayout(path.into(), tag)
            }
            Some(("oci-archive", rest)) => Self::OciArchive(rest.into()),
            Some(("docker-archive", rest)) => Self::DockerArchive(rest.into()),
            _ => Self::Registry(name.to_owned()),
        };
        let empty = match &source {
            Self::OciLayout(path, _) | Self::OciArchive(path) | Self::DockerArchive(path) => {
                path.as_os_str().is_empty()
            }
            Self::Registry(name) => name.is_empty(),
        };
        if empty {
            return Err(Error::Name(format!(
                "{name:?} names no image: give oci:DIR, oci-archive:FILE, docker-archive:FILE or a registry reference"
            )));
        }
        Ok(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_told_from_the_others() {
        let parse = |name: &str| {
            let source = name.parse::<Source>().unwrap();
            assert_eq!(source.to_string(), name);
            source
        };
        assert_eq!(parse("oci:/a/b"), Source::OciLayout("/a/b".into(), None));
        assert_eq!(parse("oci:/a/b:v1"), Source::OciLayout("/a/b".into(), Some("v1".into())));
        assert_eq!(parse("oci-archive:x.tar"), Source::OciArchive("x.tar".into()));
        assert_eq!(parse("docker-archive:x.tar"), Source::DockerArchive("x.tar".into()));
        assert_eq!(parse("localhost:5000/a:b"), Source::Registry("localhost:5000/a:b".into()));
        assert_eq!(parse("debian"), Source::Registry("debian".into()));
        assert!("oci:".parse::<Source>().is_err() && "".parse::<Source>().is_err());
    }
}
