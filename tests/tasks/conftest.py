"""What the tests of data sets share: pictures."""

from io import BytesIO

from PIL import Image


def png(colour="red", size=(32, 32)):
    """An encoded picture of one colour."""
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()
